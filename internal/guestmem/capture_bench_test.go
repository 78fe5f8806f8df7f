package guestmem

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkCopy is what a machine stands still for in mode diff, beside its
// floor: the same bytes copied within this process to memory that is as fresh.
func BenchmarkCopy(b *testing.B) {
	for _, mib := range []int{20, 200, 1000} {
		b.Run(strconv.Itoa(mib), func(b *testing.B) {
			c := startMachine(b, roleMachine, mib<<20/PageSize)
			c.tell("dirtyall")
			c.pause()
			b.Run("copy", func(b *testing.B) {
				b.SetBytes(int64(mib << 20))
				for b.Loop() {
					held, err := c.space.Copy(b.Context())
					if err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					if err := held.Close(); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
			b.Run("reserved", func(b *testing.B) {
				b.SetBytes(int64(mib << 20))
				for b.Loop() {
					b.StopTimer()
					room, err := c.space.Reserve(b.Context())
					if err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
					held, err := room.Copy(b.Context())
					if err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					if err := held.Close(); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
			b.Run("private", func(b *testing.B) {
				for b.Loop() {
					if _, err := privateRuns(c.space); err != nil {
						b.Fatal(err)
					}
				}
			})
			src := freshMemory(b, mib<<20)
			for i := range src {
				src[i] = byte(i)
			}
			b.Run("floor", func(b *testing.B) {
				b.SetBytes(int64(mib << 20))
				for b.Loop() {
					dst := freshMemory(b, mib<<20)
					var group sync.WaitGroup
					for i := range 2 {
						half := len(src) / 2
						group.Go(func() { copy(dst[i*half:][:half], src[i*half:]) })
					}
					group.Wait()
					b.StopTimer()
					_ = unix.Munmap(dst)
					b.StartTimer()
				}
			})
			_ = unix.Munmap(src)
		})
	}
}

func freshMemory(b *testing.B, size int) []byte {
	b.Helper()
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	return mem
}

// BenchmarkTwin is what a machine stands still for in mode live.
func BenchmarkTwin(b *testing.B) {
	for _, mib := range []int{20, 200, 1000} {
		b.Run(strconv.Itoa(mib), func(b *testing.B) {
			c := startMachine(b, roleMachine, mib<<20/PageSize)
			c.tell("dirtyall")
			for b.Loop() {
				b.StopTimer()
				p, err := freezer(b, roleHelper).Prepare(b.Context(), c.space)
				if err != nil {
					b.Fatal(err)
				}
				c.pause()
				b.StartTimer()
				twin, err := p.Freeze(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				c.resume()
				if err := twin.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkSave is what goes on beside the machine that has been resumed: from
// a copy, from a twin, and from a twin whose pages are scattered.
func BenchmarkSave(b *testing.B) {
	const pages = 200 << 20 / PageSize
	c := startMachine(b, roleMachine, pages)
	c.tell("dirtyall")
	img := openImage(b, c.path)
	held, err := c.space.Copy(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	defer held.Close()
	sparse := startMachine(b, roleMachine, pages)
	var fields []string
	for p := 0; p < pages; p += 10 {
		fields = append(fields, strconv.Itoa(p))
		if len(fields) == 1000 {
			sparse.tell("dirty %s", strings.Join(fields, " "))
			fields = nil
		}
	}
	for name, tt := range map[string]struct {
		src Source
		img *Image
	}{"copy": {held, img}, "space": {c.space, img}, "scattered": {sparse.space, openImage(b, sparse.path)}} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(countPrivate(b, tt.src) * PageSize))
			for b.Loop() {
				w := newWriter(b, tt.img.Size())
				if err := Save(b.Context(), tt.src, tt.img, tt.img, w); err != nil {
					b.Fatal(err)
				}
				if _, err := w.Close(); err != nil {
					b.Fatal(err)
				}
				_ = os.Remove(w.f.Name())
			}
		})
	}
}
