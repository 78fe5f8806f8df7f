package agent_test

import (
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
)

func changes(t *testing.T, c *guest.Client) []guest.Change {
	t.Helper()
	var all []guest.Change
	truncated, err := c.Changes(within(t), func(ch guest.Change) error {
		all = append(all, ch)
		return nil
	})
	if err != nil || truncated {
		t.Fatalf("changes: truncated %t, %v", truncated, err)
	}
	return all
}

func paths(all []guest.Change) []string {
	var list []string
	for _, ch := range all {
		list = append(list, ch.Path)
	}
	return list
}

func TestChanges(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	if err := entrust(t, c, false, secret("token", "x")); err != nil {
		t.Fatal(err)
	}
	m.write("a/file", "content", 0o640)
	m.write("a-b", "", 0o4755)
	m.write("etc/passwd", "root", 0o644)
	m.write("etc/tine/fork.d/hook", "", 0o755)
	m.write("run/pid", "1", 0o644)
	m.write("srv/run/kept", "1", 0o644)
	must(t, os.Chmod(m.path("a-b"), 0o755|os.ModeSetuid), os.Symlink("/some/where", m.path("a/link")), unix.Mkfifo(m.path("a/pipe"), 0o600))
	stamp := time.Unix(1_700_000_000, 5)
	must(t, os.Chtimes(m.path("a/file"), stamp, stamp))
	want := []string{"/a", "/a-b", "/a/file", "/a/link", "/a/pipe", "/etc", "/etc/passwd", "/etc/tine/fork.d/hook", "/srv", "/srv/run", "/srv/run/kept"}
	all := changes(t, c)
	if diff := cmp.Diff(want, paths(all)); diff != "" {
		t.Fatal(diff)
	}
	sum := sha256.Sum256([]byte("content"))
	file := guest.Change{
		Path: "/a/file", Kind: guestproto.ChangeFile, Mode: 0o640, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()),
		Size: 7, MTime: stamp.UnixNano(), Hash: sum[:],
	}
	if diff := cmp.Diff(file, all[2]); diff != "" {
		t.Error(diff)
	}
	if all[1].Mode != 0o4755 || all[3].Kind != guestproto.ChangeSymlink || all[3].Target != "/some/where" ||
		all[4].Kind != guestproto.ChangeOther || all[0].Kind != guestproto.ChangeDirectory || all[0].Opaque {
		t.Errorf("%+v", all[:5])
	}
	if kinds := []string{all[0].Kind.String(), all[2].Kind.String(), guestproto.ChangeDeleted.String()}; !slices.Equal(kinds, []string{"directory", "file", "deleted"}) {
		t.Errorf("kinds are %q", kinds)
	}
}

// TestChangesOfAnOverlay: what overlayfs leaves in its upper directory.
func TestChangesOfAnOverlay(t *testing.T) {
	t.Parallel()
	asRoot(t)
	m := newMachine(t)
	m.write("dir/new", "", 0o644)
	must(t, unix.Mknod(m.path("gone"), unix.S_IFCHR, 0), unix.Mknod(m.path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	if err := unix.Setxattr(m.path("dir"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Skipf("needs trusted attributes: %v", err)
	}
	all := changes(t, m.dial())
	if diff := cmp.Diff([]string{"/dir", "/dir/new", "/gone", "/null"}, paths(all)); diff != "" {
		t.Fatal(diff)
	}
	if !all[0].Opaque || all[2].Kind != guestproto.ChangeDeleted || all[3].Kind != guestproto.ChangeOther {
		t.Errorf("%+v", all)
	}
	if diff := cmp.Diff(guest.Change{Path: "/gone", Kind: guestproto.ChangeDeleted}, all[2]); diff != "" {
		t.Error(diff)
	}
}

// TestChangesAreInOrder: whatever names there are.
func TestChangesAreInOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		m := newMachine(t)
		name := rapid.StringMatching(`[ -.0-~]{1,4}`).Filter(func(s string) bool { return s != "." && s != ".." && s != "run" && s != "sys" && s != "dev" })
		want := map[string]bool{}
		for range rapid.IntRange(0, 30).Draw(rt, "files") {
			parts := rapid.SliceOfN(name, 1, 4).Draw(rt, "path")
			full := m.path(filepath.Join(parts...))
			if os.MkdirAll(full, 0o755) != nil {
				continue
			}
			for i := range parts {
				want["/"+strings.Join(parts[:i+1], "/")] = true
			}
		}
		c := m.dial()
		got := paths(changes(t, c))
		_ = c.Close()
		if !slices.IsSorted(got) || len(got) != len(want) {
			rt.Fatalf("got %q of %d", got, len(want))
		}
		for _, p := range got {
			if !want[p] {
				rt.Fatalf("%q was never made", p)
			}
		}
	})
}

// askChanges asks with limits, frame by frame.
func (m *machine) askChanges(req *guestproto.ChangesRequest) (all []guest.Change, truncated bool) {
	m.t.Helper()
	l := m.raw()
	defer l.conn.Close()
	nonce := []byte("0123456789abcdef")
	l.write(append(preamble(nonce), open(1, guestproto.VerbChanges, req)...))
	l.untilAck(nonce)
	for f := range l.frames {
		var part guestproto.Changes
		var done guestproto.ChangesDone
		switch {
		case f.Type == guestproto.TypeData && guestproto.Decode(f.Payload[1:], &part) == nil:
			all = append(all, part.Changes...)
		case f.Type == guestproto.TypeEnd && guestproto.Decode(f.Payload[1:], &done) == nil:
			return all, done.Truncated
		default:
			m.t.Fatalf("answer is %+v: %q", f, f.Payload)
		}
	}
	m.t.Fatal("no answer")
	return nil, false
}

func TestChangesAreBounded(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	for i := range 9 {
		m.write("f"+strconv.Itoa(i), strings.Repeat("x", i), 0o644)
	}
	m.write("dir/below/x", "", 0o644)
	m.write("etc/hostname", "mine", 0o644)
	for limit, want := range map[int]struct {
		entries   int
		truncated bool
	}{0: {13, false}, 13: {13, false}, 12: {12, true}, 3: {3, true}, 1: {1, true}, 1 << 40: {13, false}} {
		all, truncated := m.askChanges(&guestproto.ChangesRequest{Limit: limit})
		if len(all) != want.entries || truncated != want.truncated {
			t.Errorf("limit %d: %d entries, truncated %t", limit, len(all), truncated)
		}
	}
	for name, tt := range map[string]struct {
		req    guestproto.ChangesRequest
		hashed string
	}{
		"all":       {guestproto.ChangesRequest{}, "012345678"},
		"of-a-file": {guestproto.ChangesRequest{HashFile: 5}, "012345"},
		"in-all":    {guestproto.ChangesRequest{HashTotal: 10}, "01234"},
	} {
		all, _ := m.askChanges(&tt.req)
		hashed := ""
		for _, ch := range all {
			if base := filepath.Base(ch.Path); base[0] == 'f' && len(ch.Hash) > 0 {
				hashed += base[1:]
			}
		}
		if hashed != tt.hashed {
			t.Errorf("%s: hashed are %q", name, hashed)
		}
	}
}

// TestChangesOfADeepTree: no path is longer than can be told.
func TestChangesOfADeepTree(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	dir, err := os.OpenRoot(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.Repeat("d", 200)
	for range 30 {
		must(t, dir.Mkdir(name, 0o755))
		sub, oerr := dir.OpenRoot(name)
		must(t, oerr, dir.Close())
		dir = sub
	}
	must(t, dir.Close())
	all, truncated := m.askChanges(&guestproto.ChangesRequest{})
	if !truncated || len(all) != guestproto.MaxChangePath/201 {
		t.Errorf("%d entries, truncated %t", len(all), truncated)
	}
}

func TestChangesNotTaken(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	for i := range 2000 {
		m.write("f"+strconv.Itoa(i), "", 0o644)
	}
	c := m.dial()
	enough := errors.New("enough")
	if _, err := c.Changes(within(t), func(guest.Change) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("error is %v", err)
	}
	if all := changes(t, c); len(all) != 2000 {
		t.Errorf("then %d", len(all))
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
