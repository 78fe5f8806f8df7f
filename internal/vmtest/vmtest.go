// Package vmtest gives tests that boot machines what they boot: one image and
// one state directory, built once and shared by all packages and all runs.
//
// It never skips: on a machine that cannot build the image the test fails, and
// says what is missing.
package vmtest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/vmm"
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

// Agent is the path of the agent's binary, which make builds.
func Agent(t testing.TB) string {
	t.Helper()
	path := filepath.Join(repository(t), "bin", "tine-agent")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v; run make build first", err)
	}
	return path
}

// Images is the shared image store.
func Images(t testing.TB) *image.Store {
	t.Helper()
	store, err := image.Open(image.Config{Dir: filepath.Join(StateDir(t), "images"), Agent: Agent(t)})
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
