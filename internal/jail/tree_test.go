package jail

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

const loaderList = "\tlinux-vdso.so.1 (0x00007ffc)\n" +
	"\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f3a)\n" +
	"\tlibz.so.1 => /opt/a b/libz.so.1 (0x00007f3b)\n" +
	"\tlibgone.so.2 => not found\n" +
	"\tlibodd.so =>\n" +
	"\t/lib64/ld-linux-x86-64.so.2 => /lib64/ld-linux-x86-64.so.2 (0x00007f3c)\n"

func TestParseLoaderList(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		out  string
		want []string
	}{
		"empty":   {},
		"static":  {"\tstatically linked\n", nil},
		"usual":   {"\tlibm.so.6 => /lib/libm.so.6 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n", []string{"/lib/libm.so.6", "/lib/libc.so.6"}},
		"no-end":  {"a => /b", []string{"/b"}},
		"missing": {"\tliba.so => not found\n", nil},
		"spaces":  {"\tliba.so => /opt/a b/liba.so (0x7f)\n", []string{"/opt/a b/liba.so"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(tt.want, parseLoaderList(tt.out)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzParseLoaderList(f *testing.F) {
	f.Add(loaderList)
	f.Add("=> => /x (")
	f.Add("a => /\x00 (0x1)\n\n=>")
	f.Fuzz(func(t *testing.T, out string) {
		for _, lib := range parseLoaderList(out) {
			if !filepath.IsAbs(lib) || !strings.Contains(out, lib) {
				t.Errorf("library %q of %q", lib, out)
			}
		}
	})
}

// A tree is made once for the same files, whoever makes it, and anew for others.
func TestMakeTree(t *testing.T) {
	t.Parallel()
	dir, files := filepath.Join(t.TempDir(), "trees"), t.TempDir()
	program, other := filepath.Join(files, "program"), filepath.Join(files, "rom")
	for path, text := range map[string]string{program: "#!", other: "\x7fELF which is cut off"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	names := make([]string, 4)
	var wg sync.WaitGroup
	for i := range names {
		wg.Go(func() {
			path, err := makeTree(t.Context(), dir, program, []string{other, other, files + "//rom"})
			if err != nil {
				t.Error(err)
			}
			names[i] = path
		})
	}
	wg.Wait()
	for _, name := range names {
		if name != names[0] {
			t.Errorf("trees %s and %s of the same files", names[0], name)
		}
	}
	for path, want := range map[string]string{program: "#!", other: "\x7fELF which is cut off"} {
		if data, err := os.ReadFile(filepath.Join(names[0], path)); err != nil || string(data) != want {
			t.Errorf("%s has %q, %v", path, data, err)
		}
	}
	if err := os.Chtimes(other, time.Time{}, time.Unix(1, 2)); err != nil {
		t.Fatal(err)
	}
	changed, err := makeTree(t.Context(), dir, program, []string{other})
	if err != nil || changed == names[0] {
		t.Errorf("tree %s of a file that has changed, %v", changed, err)
	}
	fewer, err := makeTree(t.Context(), dir, program, nil)
	if err != nil || fewer == names[0] || fewer == changed {
		t.Errorf("tree %s of fewer files, %v", fewer, err)
	}
	mounts, err := makeTree(t.Context(), dir, program, nil, RunDir)
	if err != nil || mounts == fewer {
		t.Errorf("tree %s with a directory more, %v", mounts, err)
	}
	if entries, err := os.ReadDir(filepath.Join(mounts, RunDir)); err != nil || len(entries) > 0 {
		t.Errorf("directory has %v, %v", entries, err)
	}
	checkTrees(t, dir, 4)
	if hidden, err := makeTree(t.Context(), dir, program, nil, filepath.Dir(program)); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("tree %s of a program that will be hidden, %v", hidden, err)
	}
}

func checkTrees(t *testing.T, dir string, want int) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "new-") {
			t.Errorf("%s is left", e.Name())
		}
	}
	if len(entries) != want {
		t.Errorf("%d trees, want %d", len(entries), want)
	}
}

func TestMakeTreeFails(t *testing.T) {
	t.Parallel()
	dir, files := t.TempDir(), t.TempDir()
	for name, others := range map[string][]string{
		"missing":   {filepath.Join(files, "missing")},
		"directory": {files}, // found out while copying
	} {
		t.Run(name, func(t *testing.T) {
			if path, err := makeTree(t.Context(), dir, "/bin/true", others); err == nil {
				t.Errorf("tree %s", path)
			}
			checkTrees(t, dir, 0)
		})
	}
}

// TestTreeIsForAll: a program of another user sees what a careful daemon made.
// Not parallel: there is one umask.
func TestTreeIsForAll(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	j := openJail(t)
	startIn(t, take(t, j), "idle", Job{}).end(t)
	err := filepath.WalkDir(j.tree, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && (info.Mode().Perm()&0o555 != 0o555 || info.Mode().Perm()&0o022 != 0) {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
