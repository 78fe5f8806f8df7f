package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/tinevm/tine/internal/errdef"
)

// initrd makes the initramfs of the agent and a kernel's modules. It is made
// anew for every build: that is quicker than finding out whether it has to be.
func (s *Store) initrd(ctx context.Context, boot kernelArtifact) (b Blob, err error) {
	scratch, release, err := s.scratch(ctx, "initrd-"+filepath.Base(s.blobPath(boot.Modules)))
	if err != nil {
		return Blob{}, fmt.Errorf("make initramfs: %w", err)
	}
	defer func() { err = errors.Join(err, release()) }()
	modules, err := os.Open(s.blobPath(boot.Modules))
	if err != nil {
		return Blob{}, fmt.Errorf("make initramfs: %w", err)
	}
	defer func() { _ = modules.Close() }() // only read
	agent, size, err := s.openAgent()
	if err != nil {
		return Blob{}, err
	}
	defer func() { _ = agent.Close() }() // only read
	return s.putBlob(scratch, func(w io.Writer) error {
		return writeInitrd(w, agent, size, modules)
	})
}

func (s *Store) openAgent() (*os.File, int64, error) {
	f, err := os.Open(s.agent)
	if err != nil {
		err = fmt.Errorf("%w: guest agent: %w", errdef.ErrUnavailable, err)
		return nil, 0, errdef.WithHint(err, "build it with: make agent")
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() == 0) {
		err = fmt.Errorf("%w: guest agent %s: not a program", errdef.ErrInvalid, s.agent)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// writeInitrd writes an initramfs whose init is the agent.
func writeInitrd(w io.Writer, agent io.Reader, size int64, modules io.Reader) error {
	c := newCPIO(w)
	c.raw(modules)
	for _, dir := range []string{"dev", "proc", "sys", "newroot"} {
		c.dir(dir)
	}
	c.device("dev/console", 5, 1)
	c.device("dev/null", 1, 3)
	c.file("init", 0o755, size, agent)
	return c.close()
}
