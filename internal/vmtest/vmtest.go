// Package vmtest gives tests that boot machines what they boot: one image, one
// snapshot and one state directory, made once and shared by all packages and
// all runs.
//
// It never skips: on a machine that cannot build the image the test fails, and
// says what is missing.
package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker"
	"github.com/tinevm/tine/internal/vmm/qemu"
)

// Source is what the test image is built from.
const Source = "debian:bookworm+python3"

// StateDir is $TINE_TEST_STATE, or .cache/state in the repository.
func StateDir(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("TINE_TEST_STATE")
	if dir == "" {
		dir = filepath.Join(repository(t), ".cache", "state")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Images is the shared image store.
func Images(t testing.TB) *image.Store {
	t.Helper()
	store, err := image.Open(image.Config{Dir: filepath.Join(StateDir(t), "images"), Agent: Program(t, "tine-agent")})
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// Image is the shared image, built if need be.
func Image(t testing.TB) image.Image {
	t.Helper()
	img, _, err := Images(t).Build(t.Context(), image.BuildRequest{Name: "py", Source: Source})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// NamedEngine is the engine that tests are to use, $TINE_TEST_ENGINE, if they are
// to use a certain one.
func NamedEngine() (name string, ok bool) {
	name = os.Getenv("TINE_TEST_ENGINE")
	return name, name != ""
}

// Engine is that engine, or else QEMU's software emulation, which works on every
// machine, in its jail.
func Engine(t testing.TB) vmm.Engine {
	t.Helper()
	engine, err := open(t)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	return engine
}

func open(t testing.TB) (vmm.Engine, error) {
	name, _ := NamedEngine()
	switch name {
	case "", "qemu-tcg":
		return qemu.New(t.Context(), qemu.Config{Accel: qemu.TCG, Jail: Jail(t)})
	case "qemu-kvm":
		return qemu.New(t.Context(), qemu.Config{Accel: qemu.KVM, Jail: Jail(t)})
	case firecracker.Name:
		return firecracker.New(t.Context(), firecracker.Config{Binary: os.Getenv("FIRECRACKER"), Jail: Jail(t)})
	}
	return nil, fmt.Errorf("%w: no engine %q for tests", errdef.ErrInvalid, name)
}

// Jail is the jail that machines of tests run in.
func Jail(t testing.TB) *jail.Config {
	t.Helper()
	groups, err := cgroup.Open(cgroup.Config{Name: "tine-test", Disk: StateDir(t)})
	return &jail.Config{
		Command: []string{Program(t, "tine"), "role", "launch"}, Dir: filepath.Join(StateDir(t), "jail"), UIDs: jail.DefaultUIDs,
		Groups: groups, NoGroups: err, Spare: 2,
	}
}

// Imports are the modules that the interpreter of the shared snapshot has
// loaded.
func Imports() []string { return []string{"json", "os", "random", "ssl", "time", "uuid"} }

// SnapshotTag is the tag of the shared snapshot.
const SnapshotTag = "py"

// Snapshot is the shared store and the snapshot in it of the shared image, in
// 256 MiB and on Engine: made anew if there is none, or if it is of another
// image or engine. Tests must not change it.
func Snapshot(t testing.TB) (*snapshot.Store, snapshot.Snapshot) {
	t.Helper()
	img := Image(t)
	store, err := snapshot.Open(filepath.Join(StateDir(t), "snapshots"), nil)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := durable.Lock(t.Context(), filepath.Join(StateDir(t), "snapshot.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if unlockErr := durable.Unlock(lock); unlockErr != nil {
			t.Error(unlockErr)
		}
	}()
	snap, err := template(t, store, img)
	if err != nil {
		t.Fatal(err)
	}
	return store, snap
}

func template(t testing.TB, store *snapshot.Store, img image.Image) (_ snapshot.Snapshot, err error) {
	m, err := sandbox.NewManager(t.Context(), sandbox.Config{
		Dir: filepath.Join(StateDir(t), "sandboxes"), Engine: Engine(t), Snapshots: store, Images: Images(t), Ephemeral: true,
	})
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(t.Context()))) }()
	snap, err := store.Resolve(SnapshotTag)
	if err == nil && snap.Manifest.Image == img.Digest && hasImports(snap) && m.CanFork(t.Context(), SnapshotTag) == nil {
		return snap, nil
	}
	return m.CreateSnapshot(t.Context(), sandbox.SnapshotRequest{
		Tag: SnapshotTag, Image: img.Digest, Imports: Imports(), Replace: true,
	})
}

func hasImports(snap snapshot.Snapshot) bool {
	return slices.Contains(snap.Manifest.Warmup, "import "+strings.Join(Imports(), ", "))
}

// Boot is how to boot an image.
func Boot(img image.Image) vmm.Boot {
	return vmm.Boot{Kernel: img.KernelPath(), Initrd: img.InitrdPath()}
}

// repository is the root of the repository that the test is in.
func repository(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	t.Fatal("no go.mod above the test's directory")
	return ""
}

// DeterministicTag is the tag of the shared deterministic snapshot.
const DeterministicTag = "py-deterministic"

// Deterministic is a runner on the shared stores, whose machines have their
// sockets in a directory of the test's own, and the tag of the shared
// deterministic snapshot of the shared image: made anew if there is none, or if
// it is of another image or engine. Tests must not change it.
func Deterministic(t testing.TB, parallel int) *deterministic.Runner {
	t.Helper()
	img := Image(t)
	store, err := snapshot.Open(filepath.Join(StateDir(t), "snapshots"), nil)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "td") //nolint:usetesting // sockets need a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if removeErr := os.RemoveAll(dir); removeErr != nil {
			t.Error(removeErr)
		}
	})
	runner, err := deterministic.New(deterministic.Config{
		Dir: dir, Engine: Engine(t), Snapshots: store, Images: Images(t), Parallel: parallel,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(runner.Close)
	lock, err := durable.Lock(t.Context(), filepath.Join(StateDir(t), "snapshot.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if unlockErr := durable.Unlock(lock); unlockErr != nil {
			t.Error(unlockErr)
		}
	}()
	snap, err := store.Resolve(DeterministicTag)
	if err == nil && snap.Manifest.Image == img.Digest && snap.RestorableBy(Engine(t)) == nil && hasImports(snap) {
		return runner
	}
	_, err = runner.Build(t.Context(), deterministic.BuildRequest{
		Tag: DeterministicTag, Image: img.Digest, Imports: Imports(), Replace: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	return runner
}
