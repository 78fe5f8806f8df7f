package api

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"syscall"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

// forkd makes snapshots of files of the daemon's host, booted by a machine that
// is always the same.
const (
	maxBootWait  = 60 // seconds
	rootfsMemory = 512
	rootfsVCPUs  = 2
)

// checkRootfs sees, in forkd's order and words, that there is what a snapshot is
// to be made of. Only an admin comes here: whoever may make images may name
// paths of the host.
func checkRootfs(b wire.CreateSnapshotRequest) error {
	switch {
	case b.Kernel == "" && b.Rootfs == "":
		return nil
	case b.Image != "":
		return fmt.Errorf("%w: set either image or kernel and rootfs, not both", errdef.ErrInvalid)
	case b.Rootfs == "":
		return fmt.Errorf("%w: rootfs is missing", errdef.ErrInvalid)
	}
	if b.Kernel != "" {
		if err := checkHostFile("kernel", b.Kernel); err != nil {
			return err
		}
	}
	return checkHostFile("rootfs", b.Rootfs)
}

// checkFree sees that a tag is free before an image is made for it.
func (s *server) checkFree(b wire.CreateSnapshotRequest) error {
	if b.Rootfs == "" || b.Replace {
		return nil
	}
	if _, err := s.Snapshots.Resolve(b.Tag); err != nil {
		return nil //nolint:nilerr // there is none; whatever else is wrong is found when it is made
	}
	return withStatus(fmt.Errorf("%w: snapshot %s already exists; DELETE first", errdef.ErrExists, b.Tag), http.StatusBadRequest)
}

// checkHostFile sees that a file is there and can be read.
func checkHostFile(what, path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: %s cannot be read: %s", errdef.ErrInvalid, what, path)
	}
	if err != nil {
		return fmt.Errorf("%w: %s not found: %s", errdef.ErrInvalid, what, path)
	}
	info, err := f.Stat()
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%w: %s cannot be read: %s", errdef.ErrInvalid, what, path)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a file: %s", errdef.ErrInvalid, what, path)
	}
	return nil
}

// ofRootfs makes an image of the root filesystem that a request names, and has
// req boot it. The image has a name that follows from the path, so that the next
// one of the same path takes its place.
func (s *server) ofRootfs(ctx context.Context, b wire.CreateSnapshotRequest, req *sandbox.SnapshotRequest) error {
	if b.Rootfs == "" {
		return nil
	}
	sum := sha256.Sum256([]byte(b.Rootfs))
	img, _, err := s.Images.Build(ctx, image.BuildRequest{
		Name: "rootfs-" + hex.EncodeToString(sum[:6]), Source: "ext4:" + b.Rootfs,
	})
	if err != nil {
		return err
	}
	req.Image = img.Digest
	req.Machine.MemoryMiB = cmp.Or(req.Machine.MemoryMiB, rootfsMemory)
	req.Machine.VCPUs = cmp.Or(req.Machine.VCPUs, rootfsVCPUs)
	return nil
}

// notServed adds to a warning what of a request was read and had no effect.
func notServed(b wire.CreateSnapshotRequest, warning string) string {
	var said []string
	if warning != "" {
		said = append(said, warning)
	}
	if b.Kernel != "" {
		said = append(said, "the kernel that was given is not used: Tine boots its own, which its agent needs")
	}
	if b.Tap != "" {
		said = append(said, "the tap device that was given is not used")
	}
	return strings.Join(said, "; ")
}
