package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// disk is a model of a filesystem that dies after a given number of
// operations. It forgets, at the worst, every write and every name that was
// not synced; at the best it keeps them all.
type disk struct {
	live, synced map[string]*inode // what the kernel sees; what the platter has
	budget       int               // operations left before it dies
	temps        int
}

type inode struct {
	data, synced string
	dir          bool
}

var errDead = errors.New("the disk is dead")

func newDisk(budget int, content map[string]string) *disk {
	d := &disk{live: map[string]*inode{"/d": {dir: true}, "/s": {dir: true}, "/s/stage": {dir: true}}, budget: budget}
	for name, data := range content {
		d.live[name] = &inode{data: data, synced: data}
	}
	d.synced = maps.Clone(d.live)
	return d
}

func (d *disk) step() error {
	if d.budget == 0 {
		return errDead
	}
	d.budget--
	return nil
}

// after is what is found when the machine comes back: without power loss, all.
func (d *disk) after(powerLost bool) map[string]string {
	found := map[string]string{}
	names := d.live
	if powerLost {
		names = d.synced
	}
	for name, n := range names {
		switch {
		case n.dir || IsTemp(filepath.Base(name)):
		case powerLost:
			found[name] = n.synced
		default:
			found[name] = n.data
		}
	}
	return found
}

func (d *disk) createTemp(dir string, _ fs.FileMode) (temp, error) {
	if err := d.step(); err != nil {
		return nil, err
	}
	d.temps++
	t := modelTemp{d, fmt.Sprintf("%s/%s%d", dir, tempPrefix, d.temps)}
	d.live[t.name] = &inode{}
	return t, nil
}

func (d *disk) rename(oldName, newName string) error {
	if err := d.step(); err != nil {
		return err
	}
	for name, n := range maps.Clone(d.live) {
		if rest, ok := strings.CutPrefix(name, oldName); ok && (rest == "" || rest[0] == '/') {
			d.live[newName+rest] = n
			delete(d.live, name)
		}
	}
	return nil
}

func (d *disk) renameNew(oldName, newName string) error {
	if d.live[newName] != nil {
		return unix.EEXIST
	}
	return d.rename(oldName, newName)
}

func (d *disk) remove(name string) error {
	if err := d.step(); err != nil {
		return err
	}
	delete(d.live, name)
	return nil
}

func (d *disk) removeStale(name string) error { return d.remove(name) }

func (d *disk) sync(name string) error {
	if err := d.step(); err != nil {
		return err
	}
	n := d.live[name]
	if n == nil {
		return fs.ErrNotExist
	}
	n.synced = n.data
	if n.dir {
		d.syncNames(name)
	}
	return nil
}

// syncNames makes the names in dir durable, and with a directory's name the
// names of what was synced in it under its old name.
func (d *disk) syncNames(dir string) {
	for name := range maps.Clone(d.synced) {
		if filepath.Dir(name) == dir && d.live[name] == nil {
			delete(d.synced, name)
		}
	}
	for name, n := range d.live {
		if filepath.Dir(name) != dir {
			continue
		}
		if n.dir && d.synced[name] == nil {
			d.moveSynced(n, name)
		}
		d.synced[name] = n
	}
}

func (d *disk) moveSynced(dir *inode, newName string) {
	for name, n := range maps.Clone(d.synced) {
		if n != dir {
			continue
		}
		for child, c := range maps.Clone(d.synced) {
			if rest, ok := strings.CutPrefix(child, name+"/"); ok {
				d.synced[newName+"/"+rest] = c
			}
		}
	}
}

func (d *disk) list(dir string) ([]fs.DirEntry, error) {
	model := fstest.MapFS{}
	for name, n := range d.live {
		if filepath.Dir(name) == dir {
			mode := fs.FileMode(0o600)
			if n.dir {
				mode = fs.ModeDir | 0o700
			}
			model[filepath.Base(name)] = &fstest.MapFile{Mode: mode}
		}
	}
	return model.ReadDir(".")
}

type modelTemp struct {
	d    *disk
	name string
}

func (t modelTemp) Name() string   { return t.name }
func (t modelTemp) release() error { return nil }
func (t modelTemp) Sync() error    { return t.d.sync(t.name) }

// Write is two operations, so that a cut can fall between two halves.
func (t modelTemp) Write(p []byte) (int, error) {
	for i, half := range []string{string(p[:len(p)/2]), string(p[len(p)/2:])} {
		if err := t.d.step(); err != nil {
			return i * len(p) / 2, err
		}
		t.d.live[t.name].data += half
	}
	return len(p), nil
}

// cutEverywhere runs work on disks that die after 0, 1, 2, ... operations,
// until it succeeds, and calls check with what each left.
func cutEverywhere(t *testing.T, content map[string]string, work func(files) error, check func(d *disk, done bool)) {
	t.Helper()
	for budget := range 100 {
		d := newDisk(budget, content)
		err := work(d)
		if err != nil && !errors.Is(err, errDead) {
			t.Fatalf("cut after %d: %v", budget, err)
		}
		check(d, err == nil)
		if err == nil {
			if budget == 0 {
				t.Fatal("the work did nothing")
			}
			return
		}
	}
	t.Fatal("the work never ends")
}

func TestCrashWrite(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		content   map[string]string
		sync      bool
		powerLost bool
	}{
		"new-file-killed":         {nil, true, false},
		"new-file-power-lost":     {nil, true, true},
		"old-file-killed":         {map[string]string{"/d/f": "old"}, true, false},
		"old-file-power-lost":     {map[string]string{"/d/f": "old"}, true, true},
		"replace-file-killed":     {map[string]string{"/d/f": "old"}, false, false},
		"replace-new-file-killed": {nil, false, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			work := func(f files) error { return write(f, "/d/f", []byte("new content"), 0o600, tt.sync) }
			cutEverywhere(t, tt.content, work, func(d *disk, done bool) {
				got, isThere := d.after(tt.powerLost)["/d/f"]
				old, wasThere := tt.content["/d/f"]
				switch {
				case isThere && got == "new content":
				case done:
					t.Errorf("write returned nil and left %q", got)
				case isThere != wasThere || got != old:
					t.Errorf("after a crash: %q, there: %t", got, isThere)
				}
			})
		})
	}
}

func TestCrashCommitDir(t *testing.T) {
	t.Parallel()
	content := map[string]string{"/s/stage/a": "", "/s/stage/b": ""}
	for _, powerLost := range []bool{false, true} {
		t.Run(fmt.Sprintf("power-lost-%t", powerLost), func(t *testing.T) {
			t.Parallel()
			work := func(f files) error {
				for _, name := range slices.Sorted(maps.Keys(content)) {
					f.(*disk).live[name].data = "full" // written, but not synced, by the caller
				}
				return commitDir(f, "/s/stage", "/d/final")
			}
			cutEverywhere(t, content, work, func(d *disk, done bool) {
				got := d.after(powerLost)
				maps.DeleteFunc(got, func(name, _ string) bool { return !strings.HasPrefix(name, "/d/") })
				if len(got) == 0 && !done {
					return
				}
				want := map[string]string{"/d/final/a": "full", "/d/final/b": "full"}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("done %t (-want +got):\n%s", done, diff)
				}
			})
		})
	}
}

// The model must be able to lose things, or the tests above prove nothing.
func TestCrashModelLosesUnsynced(t *testing.T) {
	t.Parallel()
	d := newDisk(-1, map[string]string{"/d/f": "old"})
	if err := write(d, "/d/f", []byte("new"), 0o600, false); err != nil {
		t.Fatal(err)
	}
	if got := d.after(true)["/d/f"]; got != "old" {
		t.Errorf("unsynced rename survived a power cut: %q", got)
	}
	if got := d.after(false)["/d/f"]; got != "new" {
		t.Errorf("rename did not survive a kill: %q", got)
	}
}
