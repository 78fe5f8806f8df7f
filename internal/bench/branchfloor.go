package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ideal is the floor of branches: what a machine must wait for at least, and
// what a snapshot must at least do.
type ideal struct {
	dir   string
	still still
	bulk  []byte // what is copied and written: bytes that do not compress
}

// still is a machine of the same shape as those that are branched. It stands still
// but for being saved, as often as one likes.
type still interface {
	// save is how long it takes to have the state of its devices saved.
	save(ctx context.Context) (time.Duration, error)
	close(ctx context.Context) error
}

// newIdeal raises a machine from the plot's template and pauses it.
func newIdeal(ctx context.Context, p *plot) (_ *ideal, err error) {
	f := &ideal{}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close(ctx))
		}
	}()
	if f.dir, err = p.dirs.make(); err != nil {
		return nil, err
	}
	f.still, err = newStill(ctx, p)
	return f, err
}

func (f *ideal) close(ctx context.Context) error {
	ctx, cancel := late(ctx)
	defer cancel()
	var errs []error
	if f.still != nil {
		errs = append(errs, f.still.close(ctx))
	}
	if f.dir != "" {
		errs = append(errs, os.RemoveAll(f.dir))
	}
	return errors.Join(append(errs, unmap(f.bulk))...)
}

// save is how long the monitor takes to write its own state.
func (f *ideal) save(ctx context.Context) (time.Duration, error) { return f.still.save(ctx) }

// have sees to it that there are n bytes to copy and to write.
func (f *ideal) have(n int64) (err error) {
	if n <= int64(len(f.bulk)) {
		return nil
	}
	if err = unmap(f.bulk); err != nil {
		return err
	}
	if f.bulk, err = freshMemory(n); err == nil {
		fill(f.bulk)
	}
	return err
}

// copy is how long it takes to copy n bytes to memory that nobody has used yet,
// on all processors.
func (f *ideal) copy(n int64) (time.Duration, error) {
	if err := f.have(n); err != nil {
		return 0, err
	}
	begin := time.Now()
	to, err := freshMemory(n)
	if err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	part := (len(to) + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0)
	for at := 0; at < len(to); at += part {
		wg.Go(func() { copy(to[at:min(at+part, len(to))], f.bulk[at:]) })
	}
	wg.Wait()
	took := time.Since(begin)
	return took, unmap(to)
}

// freshMemory is memory that nobody has used yet, in huge pages if there are.
func freshMemory(n int64) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	mem, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", n, err)
	}
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE) // it may be refused
	return mem, nil
}

func unmap(mem []byte) error {
	if mem == nil {
		return nil
	}
	return unix.Munmap(mem)
}

// fill fills memory with what does not compress.
func fill(mem []byte) {
	block := make([]byte, min(len(mem), 1<<20))
	_, _ = rand.Read(block) // never fails: crypto/rand
	for len(mem) > 0 {
		mem = mem[copy(mem, block):]
	}
}

// write is how long it takes to have n bytes on disk.
func (f *ideal) write(n int64) (took time.Duration, err error) {
	if err = f.have(n); err != nil {
		return 0, err
	}
	file, err := os.CreateTemp(f.dir, "bulk-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, file.Close(), os.Remove(file.Name())) }()
	begin := time.Now()
	_, err = file.Write(f.bulk[:n])
	err = errors.Join(err, file.Sync())
	return time.Since(begin), err
}
