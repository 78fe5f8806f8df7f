package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func openTree(t *testing.T, limits Limits) *tree {
	t.Helper()
	tr, err := newTree(t.TempDir(), limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

func anyLimits() Limits { return Limits{Bytes: 1 << 20, Entries: 1000} }

// listing describes a tree: a line for each name, without what finish adds.
func listing(t *testing.T, dir string) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, info := strings.TrimPrefix(path, dir+"/"), d.Type()
		switch info {
		case fs.ModeDir:
			lines = append(lines, name+"/")
		case fs.ModeSymlink:
			link, err := os.Readlink(path)
			lines = append(lines, name+" -> "+link)
			return err
		case 0:
			data, err := os.ReadFile(path)
			lines = append(lines, fmt.Sprintf("%s = %s", name, data))
			return err
		default:
			lines = append(lines, name+" is odd")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestUnpack(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		layers [][]entry
		want   []string
	}{
		"plain": {
			[][]entry{{dir("./"), dir("./a"), file("./a/f", "1"), symlink("a/l", "/a/f"), hardlink("h", "./a/f")}},
			[]string{"a/", "a/f = 1", "a/l -> /a/f", "h = 1"},
		},
		"leading_slash":    {[][]entry{{file("/etc/x", "1")}}, []string{"etc/", "etc/x = 1"}},
		"implied_parents":  {[][]entry{{file("a/b/c", "1")}}, []string{"a/", "a/b/", "a/b/c = 1"}},
		"through_symlink":  {[][]entry{{symlink("lib", "usr/lib"), file("lib/x", "1")}}, []string{"lib -> usr/lib", "usr/", "usr/lib/", "usr/lib/x = 1"}},
		"absolute_symlink": {[][]entry{{symlink("etc", "/real"), file("etc/x", "1")}}, []string{"etc -> /real", "real/", "real/x = 1"}},
		"symlink_upwards":  {[][]entry{{symlink("up", "../../../.."), file("up/x", "1")}}, []string{"up -> ../../../..", "x = 1"}},
		"symlink_replaced": {[][]entry{{symlink("a", "b"), file("a", "1")}}, []string{"a = 1"}},
		"file_replaced":    {[][]entry{{file("a", "1"), file("a", "2")}}, []string{"a = 2"}},
		"dir_replaced":     {[][]entry{{file("a/b/c", "1"), file("a", "2")}}, []string{"a = 2"}},
		"dir_comes_back":   {[][]entry{{file("a/b/c", "1"), file("a", "2"), file("b", ""), dir("a"), file("a/b/d", "3")}}, []string{"a/", "a/b/", "a/b/d = 3", "b = "}},
		"dir_merged":       {[][]entry{{file("a/b", "1"), dir("a"), file("a/c", "2")}}, []string{"a/", "a/b = 1", "a/c = 2"}},
		"devices_dropped":  {[][]entry{{{name: "dev/sda", kind: '4', mode: 0o600}, {name: "pipe", kind: '6'}}}, []string{"dev/"}},
		"hard_link_over_layers": {
			[][]entry{{file("a", "1")}, {hardlink("b", "a")}},
			[]string{"a = 1", "b = 1"},
		},
		"whiteout":      {[][]entry{{file("a/b", "1"), file("a/c", "2")}, {file("a/.wh.b", "")}}, []string{"a/", "a/c = 2"}},
		"whiteout_dir":  {[][]entry{{file("a/b/c", "1")}, {file(".wh.a", "")}}, nil},
		"whiteout_none": {[][]entry{{file(".wh.a", "")}}, nil},
		"opaque": {
			[][]entry{{file("a/b", "1"), file("a/d/old", "2")}, {file("a/d/new", "3"), file("a/.wh..wh..opq", ""), file("a/e", "4")}},
			[]string{"a/", "a/d/", "a/d/new = 3", "a/e = 4"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := openTree(t, anyLimits())
			for _, entries := range tc.layers {
				err := tr.unpack(t.Context(), bytes.NewReader(tarOf(t, entries...)), unpackOptions{whiteouts: true})
				if err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(tc.want, listing(t, tr.dir)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestUnpackRefuses(t *testing.T) {
	t.Parallel()
	many := make([]entry, 1001)
	for i := range many {
		many[i] = file("same", "")
	}
	loop := []entry{symlink("a", "b"), symlink("b", "a"), file("a/x", "1")}
	for name, tc := range map[string]struct {
		entries []entry
		want    error
	}{
		"dot_dot":             {[]entry{file("../evil", "1")}, errdef.ErrInvalid},
		"dot_dot_inside":      {[]entry{file("a/../../evil", "1")}, errdef.ErrInvalid},
		"absolute_dot_dot":    {[]entry{file("/../evil", "1")}, errdef.ErrInvalid},
		"hard_link_out":       {[]entry{hardlink("x", "../../../etc/passwd")}, errdef.ErrInvalid},
		"hard_link_absolute":  {[]entry{hardlink("x", "/etc/passwd")}, fs.ErrNotExist},
		"hard_link_by_link":   {[]entry{symlink("e", "/etc"), hardlink("x", "e/passwd")}, fs.ErrNotExist},
		"hard_link_to_itself": {[]entry{file("x", "1"), hardlink("x", "x")}, errdef.ErrInvalid},
		"hard_link_to_dir":    {[]entry{dir("d"), hardlink("x", "d")}, errdef.ErrInvalid},
		"link_loop":           {loop, errdef.ErrInvalid},
		"file_as_dir":         {[]entry{file("a", "1"), file("a/b", "2")}, errdef.ErrInvalid},
		"file_as_root":        {[]entry{file(".", "1")}, errdef.ErrInvalid},
		"whiteout_of_parent":  {[]entry{file("a/.wh...", "")}, errdef.ErrInvalid},
		"long_name":           {[]entry{dir(strings.Repeat("a/", 2500))}, errdef.ErrInvalid},
		"too_many":            {many, errdef.ErrExhausted},
		"too_deep":            {[]entry{file(strings.Repeat("a/", 1500)+"f", "1")}, errdef.ErrExhausted},
		"too_big":             {[]entry{file("a", strings.Repeat("x", 600<<10)), file("b", strings.Repeat("x", 600<<10))}, errdef.ErrExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := openTree(t, anyLimits())
			err := tr.unpack(t.Context(), bytes.NewReader(tarOf(t, tc.entries...)), unpackOptions{whiteouts: true})
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if _, err = os.Lstat(filepath.Join(tr.dir, "../evil")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("something was written outside: %v", err)
			}
		})
	}
}

func TestUnpackStops(t *testing.T) {
	t.Parallel()
	tr := openTree(t, anyLimits())
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	err := tr.unpack(ctx, bytes.NewReader(tarOf(t, file("a", "1"))), unpackOptions{})
	if !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
}

func TestFinish(t *testing.T) {
	t.Parallel()
	tr := openTree(t, anyLimits())
	readOnly := entry{name: "ro", kind: '5', mode: 0o555}
	setuid := entry{name: "ro/su", content: "x", kind: '0', mode: 0o4755}
	err := tr.unpack(t.Context(), bytes.NewReader(tarOf(t, readOnly, setuid, symlink("tmp", "var/tmp"))), unpackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err = tr.finish(RunConfig{}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{
		"ro/su": fs.ModeSetuid | 0o755, "proc": fs.ModeDir | 0o555, "sys": fs.ModeDir | 0o555, "dev": fs.ModeDir | 0o755,
		"run": fs.ModeDir | 0o755, "var/tmp": fs.ModeDir | fs.ModeSticky | 0o777, "etc/tine/fork.d": fs.ModeDir | 0o755, "etc/hosts": 0o644,
	} {
		info, err := os.Lstat(filepath.Join(tr.dir, name))
		if err != nil {
			t.Error(err)
		} else if got := info.Mode(); got|0o700 != want|0o700 { // others than root keep access
			t.Errorf("%s has mode %v, want %v", name, got, want)
		}
	}
	if info, err := os.Stat(filepath.Join(tr.dir, "ro")); err != nil || info.ModTime().Unix() != 1_600_000_000 {
		t.Errorf("ro: %v %v", info, err)
	}
}

func TestFinishRefuses(t *testing.T) {
	t.Parallel()
	for name, e := range map[string]entry{
		"reserved":         file("usr/lib/tine/x", "1"),
		"mount_point_file": file("proc", "1"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := openTree(t, anyLimits())
			if err := tr.unpack(t.Context(), bytes.NewReader(tarOf(t, e)), unpackOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := tr.finish(RunConfig{}); !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("got %v, want %v", err, errdef.ErrInvalid)
			}
		})
	}
}

func TestInterpreters(t *testing.T) {
	t.Parallel()
	program := entry{name: "usr/bin/python3.11", content: "x", kind: '0', mode: 0o755}
	local := entry{name: "opt/py/bin/python3", content: "x", kind: '0', mode: 0o755}
	for name, tc := range map[string]struct {
		entries []entry
		want    []Interpreter
	}{
		"none":           {nil, nil},
		"debian":         {[]entry{program, symlink("usr/bin/python3", "python3.11")}, []Interpreter{{Name: "python", Argv: []string{"/usr/bin/python3"}}}},
		"dangling":       {[]entry{symlink("usr/bin/python3", "python3.11")}, nil},
		"loop":           {[]entry{symlink("usr/bin/python3", "python3")}, nil},
		"not_executable": {[]entry{file("usr/bin/python3", "x")}, nil},
		"upwards": {
			[]entry{local, symlink("usr/local/bin/python3", "../../../opt/py/bin/python3")},
			[]Interpreter{{Name: "python", Argv: []string{"/usr/local/bin/python3"}}},
		},
		"own_first": {
			[]entry{program, symlink("usr/bin/python3", "/usr/bin/python3.11"), local, symlink("usr/local/bin", "/opt/py/bin")},
			[]Interpreter{{Name: "python", Argv: []string{"/usr/local/bin/python3"}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := openTree(t, anyLimits())
			if err := tr.unpack(t.Context(), bytes.NewReader(tarOf(t, tc.entries...)), unpackOptions{}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, tr.interpreters()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzUnpack(f *testing.F) {
	t := &testing.T{}
	f.Add(tarOf(t, file("a/b", "1"), symlink("l", "/a"), hardlink("l/c", "a/b"), file("a/.wh.b", "")))
	f.Add(tarOf(t, file("a/b", "1"), file("a/.wh..wh..opq", ""), symlink("x", "../.."), file("x/evil", "1")))
	f.Fuzz(func(t *testing.T, data []byte) {
		tr := openTree(t, anyLimits())
		scratch := filepath.Dir(tr.dir)
		if tr.unpack(t.Context(), bytes.NewReader(data), unpackOptions{whiteouts: true}) == nil {
			_ = tr.finish(RunConfig{}) // may refuse; must not reach out
		}
		around, err := os.ReadDir(scratch)
		if err != nil || len(around) != 1 {
			t.Errorf("outside of the tree: %v, %v", around, err)
		}
	})
}
