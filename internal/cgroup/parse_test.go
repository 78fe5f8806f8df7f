package cgroup

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func TestParseMemberships(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		text string
		want []membership
		bad  bool
	}{
		"v2":     {"0::/user.slice/a b\n", []membership{{nil, "/user.slice/a b"}}, false},
		"v1":     {"3:cpu,cpuacct:/box\n1:name=systemd:/\n", []membership{{[]string{"cpu", "cpuacct"}, "/box"}, {[]string{"name=systemd"}, "/"}}, false},
		"colons": {"0::/a:b::c", []membership{{nil, "/a:b::c"}}, false},
		"gone":   {"0::/a (deleted)\n", []membership{{nil, "/a (deleted)"}}, false},
		"empty":  {"", nil, false},
		"short":  {"0:/\n", nil, true},
		"no-way": {"0::a\n", nil, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parseMemberships([]byte(tt.text))
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(membership{})); diff != "" || (err != nil) != tt.bad {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}

func TestParseMounts(t *testing.T) {
	t.Parallel()
	text := `22 1 0:21 / /proc rw shared:5 - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 /docker/ab /sys/fs/cgroup/cpu,cpuacct ro,nosuid shared:9 master:1 - cgroup cgroup rw,cpu,cpuacct
41 31 0:38 / /a\040b\134 rw - cgroup2 cgroup2 rw,nsdelegate
42 31 0:38 / /short rw cgroup2
nonsense
`
	want := []mount{
		{"/docker/ab", "/sys/fs/cgroup/cpu,cpuacct", false, []string{"rw", "cpu", "cpuacct"}},
		{"/", `/a b\`, true, []string{"rw", "nsdelegate"}},
	}
	if diff := cmp.Diff(want, parseMounts([]byte(text)), cmp.AllowUnexported(mount{})); diff != "" {
		t.Error(diff)
	}
}

func TestUnescape(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{`a\040b`: "a b", `\0`: `\0`, `\999`: `\999`, `x\011`: "x\t", "": ""} {
		if got := unescape(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestParseNumber(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]int64{
		"0\n": 0, "42": 42, "max\n": math.MaxInt64, "9223372036854771712\n": 9223372036854771712,
		"18446744073709551615\n": math.MaxInt64,
	} {
		if got, err := parseNumber([]byte(in)); err != nil || got != want {
			t.Errorf("%q: got %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "-1", "1 2", "18446744073709551616", "x"} {
		if got, err := parseNumber([]byte(in)); !errors.Is(err, errdef.ErrInvalid) || got != 0 {
			t.Errorf("%q: got %d, %v", in, got, err)
		}
	}
}

func TestParseField(t *testing.T) {
	t.Parallel()
	text := []byte("oom 7\noom_kill 3\noom_group_kill 1\nbad x\nhierarchical_memory_limit 18446744073709551615\n")
	for key, want := range map[string]int64{
		"oom_kill": 3, "oom": 7, "absent": 0, "oom_kil": 0, "hierarchical_memory_limit": math.MaxInt64,
	} {
		if got, err := parseField(text, key); err != nil || got != want {
			t.Errorf("%s: got %d, %v; want %d", key, got, err, want)
		}
	}
	if _, err := parseField(text, "bad"); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a field that is no number: %v", err)
	}
}

func TestParsePIDs(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		text string
		want []int
		bad  bool
	}{
		"none":     {"", nil, false},
		"some":     {"7\n12\n", []int{7, 12}, false},
		"cut":      {"7\n12", []int{7}, false},
		"unseen":   {"0\n7\n", []int{0, 7}, false},
		"negative": {"-1\n", nil, true},
		"huge":     {"4294967297\n", nil, true},
		"blank":    {"\n", nil, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parsePIDs([]byte(tt.text))
			if !slices.Equal(got, tt.want) || (err != nil) != tt.bad {
				t.Errorf("got %v, %v; want %v", got, err, tt.want)
			}
		})
	}
}

func TestParseIO(t *testing.T) {
	t.Parallel()
	const (
		v1 = "8:0 Read 100\n8:0 Write 20\n8:0 Sync 120\n8:0 Total 120\n8:16 Read 5\nTotal 125\n"
		v2 = "8:0 rbytes=100 wbytes=20 rios=3 wios=4 dbytes=0 dios=0\n8:16 rbytes=5 wbytes=6 rios=1\n253:0 \n"
	)
	tests := map[string]struct {
		text, device  string
		read, written int64
		bad           bool
	}{
		"v1":       {v1, "8:0", 100, 20, false},
		"v1-all":   {v1, "", 105, 20, false},
		"v2":       {v2, "8:0", 100, 20, false},
		"v2-all":   {v2, "", 105, 26, false},
		"nothing":  {"Total 0\n", "", 0, 0, false},
		"other":    {v2, "9:9", 0, 0, false},
		"too-many": {"8:0 rbytes=max\n8:1 rbytes=7\n", "", math.MaxInt64, 0, false},
		"odd-v1":   {"8:0 Read x\n", "", 0, 0, true},
		"odd-v2":   {"8:0 rbytes=\n", "", 0, 0, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			read, written, err := parseIO([]byte(tt.text), tt.device)
			if read != tt.read || written != tt.written || (err != nil) != tt.bad {
				t.Errorf("got %d, %d, %v; want %d, %d", read, written, err, tt.read, tt.written)
			}
		})
	}
}

func TestParseParent(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]int{"12 (sh) S 1 2 3": 1, "12 (a) Z (b c)) R 77 1": 77, "12 (a\nb) Z 5": 5} {
		if got, err := parseParent([]byte(in)); err != nil || got != want {
			t.Errorf("%q: got %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "12 (sh) S", "12 (sh) S x", "12 (sh) S -1"} {
		if _, err := parseParent([]byte(in)); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestParseDevice(t *testing.T) {
	t.Parallel()
	if got, err := parseDevice([]byte("259:3\n")); err != nil || got != "259:3" {
		t.Errorf("got %q, %v", got, err)
	}
	for _, in := range []string{"", "8", "8:", ":1", "8:1:2", "8:x", "8:1\n8:2"} {
		if got, err := parseDevice([]byte(in)); !errors.Is(err, errdef.ErrInvalid) || got != "" {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
}

func TestRelative(t *testing.T) {
	t.Parallel()
	tests := []struct {
		root, path, want string
		ok               bool
	}{
		{"/", "/", "", true},
		{"/", "/a/b", "a/b", true},
		{"/docker/x", "/docker/x", "", true},
		{"/docker/x", "/docker/x/y", "/y", true},
		{"/docker/x", "/docker/xy", "", false},
		{"/docker/x", "/", "", false},
		{"/", "/../other", "", false},
		{"/..", "/", "", false},
	}
	for _, tt := range tests {
		if got, ok := relative(tt.root, tt.path); got != tt.want || ok != tt.ok {
			t.Errorf("%s from %s: got %q, %v; want %q, %v", tt.path, tt.root, got, ok, tt.want, tt.ok)
		}
	}
}

// Whatever the kernel writes, its readers return: no panic, nothing negative,
// and nothing beside an error.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"0::/a\n4:cpu,cpuacct:/b\n", "7\n12\n0\n", "8:0 rbytes=1 wbytes=2\n8:0 Read 7\n", "12 (a) b) S 1 2",
		"32 31 0:29 / /sys/fs/cgroup/cpu\\040x rw - cgroup cgroup rw,cpu\n", "max\n", "oom_kill 3\n", "259:3\n", "\\", ")",
	} {
		f.Add([]byte(seed), "oom_kill")
	}
	f.Fuzz(func(t *testing.T, data []byte, key string) {
		if all, err := parseMemberships(data); err != nil && all != nil {
			t.Errorf("memberships %v beside %v", all, err)
		}
		for _, m := range parseMounts(data) {
			if strings.Count(m.root, "")+strings.Count(m.point, "") > len(data)+2 {
				t.Errorf("mount %v is longer than its text", m)
			}
		}
		if n, err := parseNumber(data); n < 0 || err != nil && n != 0 {
			t.Errorf("number %d, %v", n, err)
		}
		if n, err := parseField(data, key); n < 0 || err != nil && n != 0 {
			t.Errorf("field %d, %v", n, err)
		}
		if all, err := parsePIDs(data); slices.ContainsFunc(all, func(n int) bool { return n < 0 }) || err != nil && all != nil {
			t.Errorf("processes %v, %v", all, err)
		}
		if r, w, _ := parseIO(data, key); r < 0 || w < 0 {
			t.Errorf("bytes %d and %d", r, w)
		}
		if n, err := parseParent(data); n < 0 || err != nil && n != 0 {
			t.Errorf("parent %d, %v", n, err)
		}
		if d, err := parseDevice(data); (err == nil) != (d != "") || strings.ContainsAny(d, " /\n") {
			t.Errorf("device %q, %v", d, err)
		}
	})
}
