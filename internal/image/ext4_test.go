package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

// ext4Of makes a filesystem image of a directory.
func ext4Of(t *testing.T, dir, uuid string) string {
	t.Helper()
	mkfs, err := toolMkfsExt4.find()
	if err != nil {
		t.Fatalf("%v: install the package %s", err, toolMkfsExt4.pkg)
	}
	path := filepath.Join(t.TempDir(), "rootfs.ext4")
	cmd := exec.CommandContext(t.Context(), mkfs, "-q", "-F", "-U", uuid, "-d", dir, path, "16M")
	cmd.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1700000000") // lost+found is as old as the image
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return path
}

// TestBuildExt4 sees that a filesystem image makes the root that the directory
// makes which it was made of.
func TestBuildExt4(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	req := request(t, "of-dir")
	ofDir, _ := build(t, s, req)
	dir, _ := strings.CutPrefix(req.Source, "dir:")
	req.Name, req.Source = "of-image", "ext4:"+ext4Of(t, dir, "11111111-1111-1111-1111-111111111111")
	img, hit := build(t, s, req)
	if hit {
		t.Error("the first build was a hit")
	}
	if diff := cmp.Diff(ofDir.Manifest.Interpreters, img.Manifest.Interpreters); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(contents(t, extract(t, ofDir)), contents(t, extract(t, img))); diff != "" {
		t.Error(diff)
	}
	// Another image of the same content is the same root.
	req.Name, req.Source = "again", "ext4:"+ext4Of(t, dir, "22222222-2222-2222-2222-222222222222")
	again, _ := build(t, s, req)
	if again.Manifest.Root != img.Manifest.Root {
		t.Errorf("got root %v, want %v", again.Manifest.Root, img.Manifest.Root)
	}
}

// contents are the files and links below a directory.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		name, text := strings.TrimPrefix(path, dir), info.Mode().String()
		switch {
		case info.Mode().IsRegular():
			text += " " + info.ModTime().UTC().String() + " " + readFile(t, path)
		case info.Mode()&os.ModeSymlink != 0:
			to, linkErr := os.Readlink(path)
			text, err = text+" "+to, linkErr
		}
		found[name] = text
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestBuildExt4Refuses(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	dir := sourceDir(t)
	good := ext4Of(t, dir, "clear")
	cut := filepath.Join(t.TempDir(), "cut")
	if err := os.WriteFile(cut, []byte(readFile(t, good)[:1<<20]), 0o600); err != nil {
		t.Fatal(err)
	}
	text := filepath.Join(t.TempDir(), "text")
	writeFile(t, text, strings.Repeat("no filesystem\n", 1000))
	kernel := "dir:" + kernelTree(t)
	for name, test := range map[string]struct {
		path string
		want error
		says string
	}{
		"missing":   {filepath.Join(dir, "none"), errdef.ErrNotFound, "no such file"},
		"directory": {dir, errdef.ErrInvalid, "not a regular file"},
		"text":      {text, errdef.ErrInvalid, "no ext2, ext3 or ext4"},
		"cut":       {cut, errdef.ErrInvalid, "cut short"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, err := s.Build(t.Context(), BuildRequest{Name: "x", Source: "ext4:" + test.path, Kernel: kernel})
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %v that says %q", err, test.want, test.says)
			}
		})
	}
	t.Run("limits", func(t *testing.T) {
		t.Parallel()
		small := openStore(t)
		small.limits = Limits{Bytes: 3, Entries: 100}
		_, _, err := small.Build(t.Context(), BuildRequest{Name: "x", Source: "ext4:" + good, Kernel: kernel})
		if !errors.Is(err, errdef.ErrExhausted) {
			t.Errorf("got %v, want %v", err, errdef.ErrExhausted)
		}
	})
}
