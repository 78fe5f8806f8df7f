package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// mountPoints are what the agent mounts on or writes to in every guest.
var mountPoints = []struct {
	name string
	mode int64
}{
	{"proc", 0o555},
	{"sys", 0o555},
	{"dev", 0o755},
	{"run", 0o755},
	{"tmp", 0o1777},
	{"etc/tine/fork.d", 0o755},
}

// reserved is where the agent puts files of its own.
const reserved = "usr/lib/tine"

// envFile holds the image's environment, a NAME=value a line.
const envFile = "etc/tine/env"

// finish adds what every guest needs, and gives the directories their owners,
// modes and times now that nothing more is written into them.
func (t *tree) finish(config RunConfig) error {
	if _, err := t.root.Lstat(reserved); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: root tree: /%s must not be there: Tine's agent uses it", errdef.ErrInvalid, reserved)
	}
	for _, m := range mountPoints {
		if err := t.mountPoint(m.name, m.mode); err != nil {
			return fmt.Errorf("make /%s: %w", m.name, err)
		}
	}
	if err := t.hosts(); err != nil {
		return fmt.Errorf("make /etc/hosts: %w", err)
	}
	if err := t.environment(config.Env); err != nil {
		return fmt.Errorf("make /%s: %w", envFile, err)
	}
	known := make([]string, 0, len(t.dirs))
	for at := range t.dirs {
		known = append(known, at)
	}
	slices.Sort(known)
	slices.Reverse(known) // what is in a directory before the directory
	for _, at := range known {
		if err := t.setDir(at, t.dirs[at]); err != nil {
			return fmt.Errorf("finish /%s: %w", at, err)
		}
	}
	return nil
}

func (t *tree) mountPoint(name string, mode int64) error {
	if _, err := t.follow(name, false); err == nil {
		return nil
	}
	at, err := t.follow(name, true)
	if err != nil {
		return err
	}
	hdr := impliedDir()
	hdr.Mode = mode
	t.dirs[at] = hdr
	return nil
}

// hosts makes localhost a name where the source leaves that to its runtime.
func (t *tree) hosts() error {
	return t.supply("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
}

// environment leaves the image's variables where the agent reads them.
func (t *tree) environment(env []string) error {
	if len(env) == 0 {
		return nil
	}
	for _, v := range env {
		if strings.ContainsAny(v, "\n\r\x00") {
			name, _, _ := strings.Cut(v, "=")
			return fmt.Errorf("%w: the image's variable %q holds a line break or a zero byte", errdef.ErrInvalid, name)
		}
	}
	return t.supply(envFile, strings.Join(env, "\n")+"\n")
}

// supply makes a file unless the source has brought one of that name.
func (t *tree) supply(name, text string) error {
	at, err := t.place(name)
	if err != nil {
		return err
	}
	if _, err = t.root.Lstat(at); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	hdr := &tar.Header{Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(0, 0)}
	return t.putFile(hdr, at, strings.NewReader(text))
}

func (t *tree) setDir(at string, hdr *tar.Header) error {
	d, err := t.root.Open(at)
	if err != nil {
		return err
	}
	if t.asRoot {
		err = d.Chown(hdr.Uid, hdr.Gid)
	}
	mode := hdr.FileInfo().Mode()
	if !t.asRoot {
		mode |= 0o700 // the image tool must be able to read it
	}
	if err == nil {
		err = d.Chmod(mode)
	}
	if err == nil {
		err = unix.Futimes(int(d.Fd()), timevals(hdr.ModTime))
	}
	return errors.Join(err, d.Close())
}

// pythons are where a Python is looked for, the image's own before the
// distribution's.
var pythons = []string{"usr/local/bin/python3", "usr/bin/python3"}

// interpreters finds the runtimes that can be kept warm.
func (t *tree) interpreters() []Interpreter {
	for _, name := range pythons {
		if t.executable(name) {
			return []Interpreter{{Name: "python", Argv: []string{"/" + name}}}
		}
	}
	return nil
}

// executable says whether name leads to a program, links followed.
func (t *tree) executable(name string) bool {
	for range maxHops {
		dir, err := t.follow(path.Dir(name), false)
		if err != nil {
			return false
		}
		at := path.Join(dir, path.Base(name))
		info, err := t.root.Lstat(at)
		if err != nil {
			return false
		}
		if info.Mode().Type() != fs.ModeSymlink {
			return info.Mode().IsRegular() && info.Mode()&0o111 != 0
		}
		if name, err = t.root.Readlink(at); err != nil {
			return false
		}
		if !path.IsAbs(name) {
			name = path.Join(dir, name) // "..", too: dir has no links left
		}
	}
	return false
}
