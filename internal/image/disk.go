package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tinevm/tine/internal/errdef"
)

// diskFormat are the options of mkfs.ext4 for scratch disks. The features are
// listed, and so do not depend on the host's mke2fs.conf. There is no journal:
// disk and memory of a machine are frozen, and lost, together. There are no
// checksums of metadata either, which cost an emulated processor time. The
// tables of inodes are left as they are, which is zeros, so that the file stays
// as good as empty.
func diskFormat() []string {
	const features = "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super,uninit_bg"
	return []string{
		"-q", "-F", "-b", "4096", "-I", "256", "-i", "8192", "-m", "0", "-O", features,
		"-E", "lazy_itable_init=1,nodiscard,root_owner=0:0",
	}
}

// FormatDisk makes the file at path, which must not exist: an empty scratch
// disk of size bytes, for a machine that boots an image. The file is sparse. On
// error there is none.
func FormatDisk(ctx context.Context, path string, size int64) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("format disk: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("format disk %s: %w", path, err), os.Remove(path))
		}
	}()
	if err = errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	cmd, err := toolMkfsExt4.command(ctx, filepath.Dir(path), append(diskFormat(), path)...)
	if err != nil {
		return err
	}
	if err = runTool(ctx, cmd, "disk", nil); err != nil {
		return fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
	}
	return nil
}
