package daemon

import (
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/vmm/fake"
	"github.com/tinevm/tine/internal/workspace"
)

// damages are what can have become of a file.
var damages = map[string]func(path string) error{
	"empty":   func(path string) error { return os.WriteFile(path, nil, 0o600) },
	"garbage": func(path string) error { return os.WriteFile(path, []byte("\x00\xff{garbage"), 0o600) },
	"gone":    os.Remove,
	"replaced": func(path string) error {
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.Mkdir(path, 0o700)
	},
}

// TestCorruptState damages one file of a state directory after the other: the
// daemon starts and answers, and says what it has found in one line.
func TestCorruptState(t *testing.T) {
	t.Parallel()
	pristine := stateDir(t)
	d, _, stop := start(t, fake.New(), Config{StateDir: pristine, OnStop: Suspend})
	template(t, d)
	ids := fork(t, d, 2)
	if _, err := d.workspaces.Create(t.Context(), workspace.CreateRequest{Name: "w", Snapshot: "py"}); err != nil {
		t.Fatal(err)
	}
	stop()
	var files []string
	err := filepath.WalkDir(pristine, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			rel, relErr := filepath.Rel(pristine, path)
			files = append(files, rel)
			err = relErr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		for name, damage := range damages {
			if name == "replaced" && (strings.HasSuffix(file, "lock") || strings.HasPrefix(file, "audit/")) {
				continue // it says so, and does not start: without these nothing may be done
			}
			t.Run(strings.ReplaceAll(file, "/", "_")+"-"+name, func(t *testing.T) {
				t.Parallel()
				dir := stateDir(t)
				if out, err := exec.CommandContext(t.Context(), "cp", "-a", "--sparse=always", pristine+"/.", dir).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				if err := damage(filepath.Join(dir, file)); err != nil {
					t.Fatal(err)
				}
				afterDamage(t, dir, file, name, ids)
			})
		}
	}
}

// afterDamage starts a daemon on a directory with one damaged file.
func afterDamage(t *testing.T, dir, file, damage string, ids []string) {
	t.Helper()
	var log journal
	d, r, _ := start(t, fake.New(), Config{StateDir: dir, Logger: log.logger()})
	for _, path := range []string{"/v1/sandboxes", "/v1/snapshots", "/v1/workspaces", "/v1/images"} {
		if status, _, body := r.ask(t, "tcp", "GET", path, ""); status != http.StatusOK {
			t.Errorf("GET %s: %d %s", path, status, body)
		}
	}
	record := filepath.Base(file) == "sandbox.json" || (strings.HasPrefix(file, "workspaces/") && strings.HasSuffix(file, ".json"))
	if !record || damage == "gone" {
		return
	}
	path := filepath.Join(dir, file)
	if filepath.Base(file) == "sandbox.json" {
		path = filepath.Dir(path)
		if n := len(d.Sandboxes.List()); n != len(ids) { // three with the workspace's, less one
			t.Errorf("%d sandboxes, want the %d others", n, len(ids))
		}
	}
	aside, err := filepath.Glob(path + "*")
	if err != nil || len(aside) != 1 || !durable.IsAside(aside[0]) {
		t.Errorf("set aside: %q, %v", aside, err)
	}
	if n := strings.Count(log.String(), "cannot be understood"); n != 1 {
		t.Errorf("it said so %d times: %s", n, log.String())
	}
}
