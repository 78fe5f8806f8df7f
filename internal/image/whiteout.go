package image

import (
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// whiteout names of the OCI image layer format.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// whiteout removes what an OCI layer says is gone: one file, or everything in
// dir that lower layers brought.
func (t *tree) whiteout(dir, base string, layer map[string]bool) error {
	if base != whiteoutOpaque {
		gone := strings.TrimPrefix(base, whiteoutPrefix)
		if gone == "" || gone == "." || gone == ".." {
			return fmt.Errorf("%w: whiteout of %q", errdef.ErrInvalid, gone)
		}
		return t.clear(path.Join(dir, gone))
	}
	return t.clearLower(dir, layer)
}

// clearLower empties dir of all that is not of this layer.
func (t *tree) clearLower(dir string, layer map[string]bool) error {
	entries, err := fs.ReadDir(t.root.FS(), dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		at := path.Join(dir, e.Name())
		switch {
		case !layer[at]:
			err = t.clear(at)
		case e.IsDir():
			err = t.clearLower(at, layer)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
