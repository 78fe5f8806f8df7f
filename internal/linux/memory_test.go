package linux

import (
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

type span struct{ First, End uint64 } // in pages from the start of the mapping

func TestPrivatePages(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		dirty string
		want  []span
	}{
		"none":     {"", nil},
		"first":    {"0", []span{{0, 1}}},
		"last":     {"63", []span{{63, 64}}},
		"runs":     {"3 4 5 9 20 21", []span{{3, 6}, {9, 10}, {20, 22}}},
		"repeated": {"7 7 7", []span{{7, 8}}},
	}
	scanners := map[string]func(*os.File, uint64, uint64, *joiner) error{"scan": scanPages, "pagemap": readPagemap}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filledFile(t)
			cmd, _ := startChild(t, path, tt.dirty)
			m := onlyMapping(t, cmd.Process.Pid, path)
			collect := func(got *[]span) func(a, b uint64) bool {
				return func(a, b uint64) bool {
					*got = append(*got, span{(a - m.Start) / PageSize, (b - m.Start) / PageSize})
					return true
				}
			}
			var got []span
			if err := PrivatePages(cmd.Process.Pid, m.Start, m.End, collect(&got)); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			for way, scan := range scanners {
				viaScanner(t, way, cmd.Process.Pid, m, tt.want, scan, collect)
			}
		})
	}
}

func viaScanner(t *testing.T, way string, pid int, m Mapping, want []span,
	scan func(*os.File, uint64, uint64, *joiner) error, collect func(*[]span) func(a, b uint64) bool,
) {
	t.Helper()
	f, err := os.Open(procPath(pid, "pagemap"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var got []span
	j := joiner{yield: collect(&got)}
	if err = scan(f, m.Start, m.End, &j); err != nil {
		t.Errorf("%s: %v", way, err) // the kernels that tests run on have both
		return
	}
	j.flush()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", way, diff)
	}
}

func onlyMapping(t *testing.T, pid int, path string) Mapping {
	t.Helper()
	maps, err := FindMapping(pid, path)
	if err != nil {
		t.Fatal(err)
	}
	if len(maps) != 1 || maps[0].End-maps[0].Start != filePages*PageSize || maps[0].Offset != 0 {
		t.Fatalf("mappings of %s: %+v", path, maps)
	}
	return maps[0]
}

func TestPrivatePagesStops(t *testing.T) {
	t.Parallel()
	path := filledFile(t)
	cmd, _ := startChild(t, path, "1 3 5 7")
	m := onlyMapping(t, cmd.Process.Pid, path)
	calls := 0
	err := PrivatePages(cmd.Process.Pid, m.Start, m.End, func(_, _ uint64) bool {
		calls++
		return calls < 2
	})
	if err != nil || calls != 2 {
		t.Errorf("%d calls, %v; want 2", calls, err)
	}
}

func TestPrivatePagesErrors(t *testing.T) {
	t.Parallel()
	yield := func(_, _ uint64) bool { return true }
	if err := PrivatePages(os.Getpid(), 1, PageSize, yield); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("unaligned: %v", err)
	}
	if err := PrivatePages(1<<30, 0, PageSize, yield); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no such process: %v", err)
	}
}

// Pages that were written to are private, and those only read are not.
func TestMemoryUse(t *testing.T) {
	t.Parallel()
	path := filledFile(t)
	cmd, _ := startChild(t, path, "1 2 3")
	got, err := MemoryUse(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if got.RSS != got.Anonymous+got.Shared || got.Private < 3*PageSize || got.Shared < (filePages-3)*PageSize {
		t.Errorf("got %+v", got)
	}
}

func TestParseRollup(t *testing.T) {
	t.Parallel()
	const text = "55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss:   100 kB\nPss: 60 kB\n" +
		"Anonymous:  40 kB\nSwap: 9 kB\nSwapPss: 8 kB\nTHPeligible: 0\n"
	got, err := parseRollup([]byte(text))
	want := Memory{RSS: 100 << 10, Private: 48 << 10, Shared: 60 << 10, Anonymous: 40 << 10}
	if err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "Rss: x kB\n", "Rss: -1 kB\n"} {
		if _, err = parseRollup([]byte(bad)); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestParseMapping(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		line string
		want Mapping
		path string
		bad  bool
	}{
		"file":      {"7f00-8000 rw-p 00001000 fe:00 12   /a/b", Mapping{0x7f00, 0x8000, 0x1000}, "/a/b", false},
		"spaces":    {"7f00-8000 rw-p 00000000 fe:00 12   /a b (deleted)", Mapping{0x7f00, 0x8000, 0}, "/a b (deleted)", false},
		"anonymous": {"7f00-8000 rw-p 00000000 00:00 0 ", Mapping{0x7f00, 0x8000, 0}, "", false},
		"reversed":  {"8000-7f00 rw-p 00000000 00:00 0 ", Mapping{}, "", true},
		"no-number": {"x-y rw-p 00000000 00:00 0 ", Mapping{}, "", true},
		"short":     {"7f00-8000", Mapping{}, "", true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, path, err := parseMapping(tt.line)
			if got != tt.want || path != tt.path || (err != nil) != tt.bad {
				t.Errorf("got %+v %q %v", got, path, err)
			}
		})
	}
}

func FuzzParseMapping(f *testing.F) {
	f.Add("7f00-8000 rw-p 00001000 fe:00 12   /a/b")
	f.Add("-")
	f.Fuzz(func(t *testing.T, line string) {
		if m, _, err := parseMapping(line); err == nil && m.End < m.Start {
			t.Errorf("%q: %+v", line, m)
		}
	})
}

func FuzzParseRollup(f *testing.F) {
	f.Add([]byte("Rss:   100 kB\nAnonymous: 3 kB\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if m, err := parseRollup(data); err == nil && (m.RSS < 0 || m.Shared < 0 || m.Private < 0) {
			t.Errorf("%q: %+v", data, m)
		}
	})
}
