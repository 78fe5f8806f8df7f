package agent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
)

func TestWriteAndRead(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	big := bytes.Repeat([]byte("0123456789"), 200_000)
	e, err := c.WriteFile(ctx, "a/b/file", guest.WriteOptions{Parents: true, Mode: 0o640}, bytes.NewReader(big))
	if err != nil {
		t.Fatal(err)
	}
	if e.Size != int64(len(big)) || e.Mode != 0o640 || e.Type != guestproto.TypeFile || e.Path != m.path("a/b/file") || e.Name != "file" {
		t.Errorf("entry is %+v", e)
	}
	for name, tt := range map[string]struct {
		opts guest.ReadOptions
		want []byte
	}{
		"whole":  {guest.ReadOptions{}, big},
		"part":   {guest.ReadOptions{Offset: 1_000_003, Limit: 5}, []byte("34567")},
		"beyond": {guest.ReadOptions{Offset: 1 << 30}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := c.ReadFile(ctx, "a/b/file", tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got, err := io.ReadAll(f)
			if err != nil || !bytes.Equal(got, tt.want) || f.Entry().Size != int64(len(big)) {
				t.Errorf("%d bytes, %+v, %v", len(got), f.Entry(), err)
			}
		})
	}
}

func TestWriteWays(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		old   string // "" is no file
		opts  guest.WriteOptions
		want  string
		mode  os.FileMode
		isErr error
	}{
		"new":            {"", guest.WriteOptions{}, "text", 0o644, nil},
		"new-mode":       {"", guest.WriteOptions{Mode: 0o4755}, "text", 0o755 | os.ModeSetuid, nil},
		"replace":        {"old", guest.WriteOptions{}, "text", 0o600, nil},
		"replace-mode":   {"old", guest.WriteOptions{Mode: 0o444}, "text", 0o444, nil},
		"append":         {"old", guest.WriteOptions{Append: true}, "oldtext", 0o600, nil},
		"append-new":     {"", guest.WriteOptions{Append: true}, "text", 0o644, nil},
		"create":         {"", guest.WriteOptions{Create: true}, "text", 0o644, nil},
		"create-existed": {"old", guest.WriteOptions{Create: true}, "old", 0o600, errdef.ErrExists},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			if tt.old != "" {
				m.write("file", tt.old, 0o600)
			}
			_, err := m.dial().WriteFile(within(t), "file", tt.opts, strings.NewReader("text"))
			if !errors.Is(err, tt.isErr) || tt.isErr == nil && err != nil {
				t.Errorf("error is %v", err)
			}
			info, err := os.Stat(m.path("file"))
			if err != nil || info.Mode() != tt.mode || m.read("file") != tt.want {
				t.Errorf("%s %q, %v", info.Mode(), m.read("file"), err)
			}
			m.noLitter()
		})
	}
}

// noLitter checks that no temporary file is left.
func (m *machine) noLitter() {
	m.t.Helper()
	left, err := filepath.Glob(m.path(".tine-*"))
	if err != nil || len(left) > 0 {
		m.t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestWriteThroughSymlink(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.write("real", "old", 0o644)
	if err := os.Symlink("real", m.path("link")); err != nil {
		t.Fatal(err)
	}
	if _, err := m.dial().WriteFile(within(t), "link", guest.WriteOptions{}, strings.NewReader("new")); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(m.path("link")); err != nil || info.Mode()&os.ModeSymlink == 0 || m.read("real") != "new" {
		t.Errorf("%v, %q, %v", info.Mode(), m.read("real"), err)
	}
}

// failingReader gives some bytes, then fails.
type failingReader struct{ left int }

func (r *failingReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, errors.New("the source is gone")
	}
	r.left--
	return len(p), nil
}

func TestFailedWriteLeavesTheOldFile(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.write("file", "old", 0o644)
	c := m.dial()
	_, err := c.WriteFile(within(t), "file", guest.WriteOptions{}, &failingReader{left: 5})
	if err == nil || !strings.Contains(err.Error(), "the source is gone") {
		t.Errorf("error is %v", err)
	}
	if _, err = c.Ping(within(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the temporary file to go", func() bool {
		left, err := filepath.Glob(m.path(".tine-*"))
		return err == nil && len(left) == 0
	})
	if m.read("file") != "old" {
		t.Errorf("file is %q", m.read("file"))
	}
}

func TestFileErrors(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	m.write("dir/file", "text", 0o644)
	read := func(path string) error {
		_, err := c.ReadFile(ctx, path, guest.ReadOptions{})
		return err
	}
	write := func(path string, opts guest.WriteOptions) error {
		_, err := c.WriteFile(ctx, path, opts, strings.NewReader("x"))
		return err
	}
	_, statErr := c.Stat(ctx, "nope", "")
	_, _, listErr := c.List(ctx, "dir/file", guest.ListOptions{})
	for name, tt := range map[string]struct{ err, want error }{
		"read-nothing":     {read("nope"), errdef.ErrNotFound},
		"read-directory":   {read("dir"), errdef.ErrInvalid},
		"read-device":      {read("/dev/zero"), errdef.ErrInvalid},
		"read-no-path":     {read(""), errdef.ErrInvalid},
		"write-directory":  {write("dir", guest.WriteOptions{}), errdef.ErrInvalid},
		"write-no-parent":  {write("no/such/file", guest.WriteOptions{}), errdef.ErrNotFound},
		"stat-nothing":     {statErr, errdef.ErrNotFound},
		"list-file":        {listErr, errdef.ErrInvalid},
		"mkdir-exists":     {c.Mkdir(ctx, "dir", guest.MkdirOptions{}), errdef.ErrExists},
		"mkdir-over-file":  {c.Mkdir(ctx, "dir/file", guest.MkdirOptions{Parents: true}), errdef.ErrExists},
		"mkdir-no-parent":  {c.Mkdir(ctx, "no/such", guest.MkdirOptions{}), errdef.ErrNotFound},
		"move-nothing":     {c.Move(ctx, "nope", "other", ""), errdef.ErrNotFound},
		"remove-nothing":   {c.Remove(ctx, "nope", "", false), errdef.ErrNotFound},
		"remove-nothing-r": {c.Remove(ctx, "nope", "", true), errdef.ErrNotFound},
		"remove-full":      {c.Remove(ctx, "dir", "", false), errdef.ErrConflict},
		"remove-root":      {c.Remove(ctx, "/", "", true), errdef.ErrInvalid},
		"no-user":          {c.Remove(ctx, "x", "nosuchuser", true), errdef.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if !errors.Is(tt.err, tt.want) {
				t.Errorf("error is %v (%s), want %v", tt.err, errdef.Code(tt.err), tt.want)
			}
		})
	}
}

func TestTree(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	err := errors.Join(
		c.Mkdir(ctx, "top/sub/deep", guest.MkdirOptions{Parents: true, Mode: 0o700}),
		c.Mkdir(ctx, "top/sub/deep", guest.MkdirOptions{Parents: true}),
	)
	if err != nil {
		t.Fatal(err)
	}
	m.write("top/b", "12", 0o600)
	m.write("top/sub/deep/z", "", 0o644)
	if err = os.Symlink("b", m.path("top/a")); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		opts      guest.ListOptions
		want      []string
		truncated bool
	}{
		"one":   {guest.ListOptions{}, []string{"symlink a -> b", "file b", "directory sub"}, false},
		"two":   {guest.ListOptions{Depth: 2}, []string{"symlink a -> b", "file b", "directory sub", "directory sub/deep"}, false},
		"all":   {guest.ListOptions{Depth: 99}, []string{"symlink a -> b", "file b", "directory sub", "directory sub/deep", "file sub/deep/z"}, false},
		"limit": {guest.ListOptions{Depth: 99, Limit: 3}, []string{"symlink a -> b", "file b", "directory sub"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			entries, truncated, lerr := c.List(ctx, "top", tt.opts)
			if lerr != nil || truncated != tt.truncated {
				t.Errorf("truncated %t, %v", truncated, lerr)
			}
			var got []string
			for _, e := range entries {
				line := fmt.Sprintf("%s %s", e.Type, strings.TrimPrefix(e.Path, m.path("top")+"/"))
				if e.Target != "" {
					line += " -> " + e.Target
				}
				got = append(got, line)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	e, err := c.Stat(ctx, "top/sub/deep", "")
	if err != nil || e.Mode != 0o700 || e.User == "" || e.MTime == 0 {
		t.Errorf("%+v, %v", e, err)
	}
	err = errors.Join(c.Move(ctx, "top/b", "top/sub/c", ""), c.Remove(ctx, "top/sub/c", "", false), c.Remove(ctx, "top", "", true))
	if _, serr := os.Stat(m.path("top")); err != nil || !errors.Is(serr, os.ErrNotExist) {
		t.Errorf("%v, %v", err, serr)
	}
}

func TestLongListing(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	const count = 3000
	for i := range count {
		m.write(fmt.Sprintf("many/%s-%d", strings.Repeat("long", 20), i), "", 0o600)
	}
	entries, truncated, err := m.dial().List(within(t), "many", guest.ListOptions{})
	if err != nil || truncated || len(entries) != count {
		t.Errorf("%d entries, %t, %v", len(entries), truncated, err)
	}
}

func TestFilesAsUser(t *testing.T) {
	t.Parallel()
	asRoot(t)
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	m.write("secret", "root's", 0o600)
	m.write("open/x", "", 0o644)
	for _, dir := range []string{".", "open"} {
		if err := os.Chmod(m.path(dir), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for dir := filepath.Dir(m.dir); dir != "/"; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil || info.Mode()&0o001 == 0 && os.Chmod(dir, info.Mode()|0o001) != nil {
			t.Skip("the test's directory cannot be reached by others")
		}
	}
	if _, err := c.ReadFile(ctx, m.path("secret"), guest.ReadOptions{User: "nobody"}); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("read: %v", err)
	}
	e, err := c.WriteFile(ctx, m.path("open/mine"), guest.WriteOptions{User: "nobody"}, strings.NewReader("x"))
	if err != nil || e.UID != 65534 || e.User != "nobody" {
		t.Errorf("%+v, %v", e, err)
	}
	e, err = c.WriteFile(ctx, m.path("open/mine"), guest.WriteOptions{}, strings.NewReader("by root"))
	if err != nil || e.UID != 65534 {
		t.Errorf("root took the file: %+v, %v", e, err)
	}
	if _, err = c.WriteFile(ctx, m.path("secret"), guest.WriteOptions{User: "nobody"}, strings.NewReader("x")); err != nil {
		t.Logf("a user may replace files in a directory of theirs: %v", err)
	}
	if err = c.Mkdir(ctx, "/root/x", guest.MkdirOptions{User: "nobody"}); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("mkdir: %v", err)
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	m.write("top/sub/old", "", 0o644)
	w, err := c.Watch(ctx, "top", "", true)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	next := func() string {
		t.Helper()
		e, nerr := w.Next(ctx)
		if nerr != nil {
			t.Fatal(nerr)
		}
		return e.Type.String() + " " + e.Path
	}
	expect := func(want ...string) {
		t.Helper()
		for _, line := range want {
			if got := next(); got != line {
				t.Fatalf("event is %q, want %q", got, line)
			}
		}
	}
	m.write("top/sub/new", "x", 0o644)
	expect("create sub/new", "write sub/new")
	if err = os.Chmod(m.path("top/sub/new"), 0o600); err != nil {
		t.Fatal(err)
	}
	expect("chmod sub/new")
	if err = os.Rename(m.path("top/sub/new"), m.path("top/moved")); err != nil {
		t.Fatal(err)
	}
	expect("rename sub/new", "create moved")
	if err = os.Mkdir(m.path("top/made"), 0o755); err != nil {
		t.Fatal(err)
	}
	expect("create made")
	m.write("top/made/in", "", 0o644)
	expect("create made/in")
	if err = os.Rename(m.path("top/made"), m.path("top/renamed")); err != nil {
		t.Fatal(err)
	}
	expect("rename made", "create renamed", "create renamed/in")
	if err = os.Remove(m.path("top/renamed/in")); err != nil {
		t.Fatal(err)
	}
	expect("remove renamed/in")
	if err = os.RemoveAll(m.path("top")); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err = w.Next(ctx); err != nil {
			break
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
	if _, err = c.Watch(ctx, "nope", "", false); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("watch of nothing: %v", err)
	}
}

func TestWatchEndsWithItsContext(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	w, err := m.dial().Watch(within(t), ".", "", false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = w.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("next: %v", err)
	}
	m.write("still", "", 0o644)
	if e, err := w.Next(within(t)); err != nil || e.Path != "still" {
		t.Errorf("%+v, %v", e, err)
	}
	_ = w.Close()
}
