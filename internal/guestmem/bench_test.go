package guestmem

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
)

const (
	benchMemory = 1 << 30
	benchPages  = 200 << 20 / PageSize
)

// randomPages is what does not compress.
func randomPages(n int) []byte {
	data := make([]byte, n*PageSize)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data) // never fails
	return data
}

// writeScattered writes benchPages pages in runs, as far apart as they go.
func writeScattered(b *testing.B, f *os.File, data []byte, run int) Stats {
	b.Helper()
	w, err := NewWriter(f, benchMemory)
	if err != nil {
		b.Fatal(err)
	}
	step := benchMemory / PageSize / (benchPages / run)
	for i := range benchPages / run {
		at := i * run * PageSize % len(data)
		if err = w.Write(uint64(i*step), data[at:at+run*PageSize]); err != nil {
			b.Fatal(err)
		}
	}
	stats, err := w.Close()
	if err != nil {
		b.Fatal(err)
	}
	return stats
}

// Writing 200 MiB; /dev/null shows what it costs without the disk.
func BenchmarkWriter(b *testing.B) {
	kinds := map[string][]byte{"data": randomPages(4096), "zeros": make([]byte, 4096*PageSize)}
	for kind, data := range kinds {
		for _, run := range []int{1, 16, 256} {
			b.Run(fmt.Sprintf("%s/run=%d/file", kind, run), func(b *testing.B) {
				b.SetBytes(benchPages * PageSize)
				for b.Loop() {
					f := newLayerFile(b)
					stats := writeScattered(b, f, data, run)
					b.ReportMetric(float64(stats.Bytes)/float64(max(stats.Pages, 1)*PageSize), "size/data")
					_ = os.Remove(f.Name())
					_ = f.Close()
				}
			})
			b.Run(fmt.Sprintf("%s/run=%d/null", kind, run), func(b *testing.B) {
				f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(benchPages * PageSize)
				for b.Loop() {
					writeScattered(b, f, data, run)
				}
			})
		}
	}
}

// benchChain is a base of 512 MiB in 1 GiB and layers of 200 MiB in all.
func benchChain(b *testing.B, depth, run int) (base string, layers []string) {
	b.Helper()
	base = sparseBase(b, benchMemory)
	f, err := os.OpenFile(base, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	data := randomPages(4096)
	for at := int64(0); at < 512<<20; at += int64(len(data)) {
		if _, err = f.WriteAt(data, at); err != nil {
			b.Fatal(err)
		}
	}
	_ = f.Close()
	step := benchMemory / PageSize / (benchPages / run)
	for d := range depth {
		lf := newLayerFile(b)
		w, err := NewWriter(lf, benchMemory)
		if err != nil {
			b.Fatal(err)
		}
		for i := d; i < benchPages/run; i += depth {
			if err = w.Write(uint64(i*step), data[:run*PageSize]); err != nil {
				b.Fatal(err)
			}
		}
		if _, err = w.Close(); err != nil {
			b.Fatal(err)
		}
		layers = append(layers, lf.Name())
	}
	return base, layers
}

func BenchmarkImage(b *testing.B) {
	for _, depth := range []int{1, 8, 64} {
		for _, run := range []int{1, 256} {
			base, layers := benchChain(b, depth, run)
			name := fmt.Sprintf("depth=%d/run=%d/", depth, run)
			b.Run(name+"open", func(b *testing.B) {
				for b.Loop() {
					m, err := OpenImage(base, layers...)
					if err != nil {
						b.Fatal(err)
					}
					_ = m.Close()
				}
			})
			b.Run(name+"read-layers", func(b *testing.B) { benchReadLayers(b, base, layers) })
			b.Run(name+"verify", func(b *testing.B) { benchVerify(b, layers) })
			b.Run(name+"flatten", func(b *testing.B) {
				m := openImage(b, base, layers...)
				b.SetBytes(benchMemory)
				for b.Loop() {
					f := newLayerFile(b)
					if err := m.Flatten(b.Context(), f); err != nil {
						b.Fatal(err)
					}
					_ = os.Remove(f.Name())
					_ = f.Close()
				}
			})
		}
	}
}

// benchReadLayers reads each page of the layers once, as a fill does, after
// opening.
func benchReadLayers(b *testing.B, base string, layers []string) {
	b.Helper()
	buf := make([]byte, 1<<20)
	b.SetBytes(benchPages * PageSize)
	for b.Loop() {
		m, err := OpenImage(base, layers...)
		if err != nil {
			b.Fatal(err)
		}
		for first, count := range m.Ranges {
			if _, err = m.ReadAt(buf[:count*PageSize], int64(first)*PageSize); err != nil {
				b.Fatal(err)
			}
		}
		_ = m.Close()
	}
}

func benchVerify(b *testing.B, layers []string) {
	b.Helper()
	var all []*Layer
	for _, path := range layers {
		all = append(all, openLayer(b, path))
	}
	b.SetBytes(benchPages * PageSize)
	for b.Loop() {
		for _, l := range all {
			if err := l.Verify(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	}
}
