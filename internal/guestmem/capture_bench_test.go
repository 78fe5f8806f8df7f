package guestmem

import (
	"strconv"
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
