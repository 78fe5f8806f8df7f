package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/guestproto"
)

const (
	maxHashFile   = 64 << 20 // larger files are told without a hash
	maxHashTotal  = 1 << 30
	maxTreeDepth  = 256
	opaqueXattr   = "trusted.overlay.opaque"
	openDir       = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	changeCost    = 96 // bytes of a Change in a message, beside its strings
	tmpDir        = "/tmp"
	skippedAtMost = 16 // names in one directory that are not told
)

// unchanged are paths that every machine changes, as the agent writes them, and
// that therefore tell nothing. What others put below them is told.
func unchanged(path string) bool {
	switch path {
	case "/etc/hostname", "/etc/hosts", "/etc/machine-id", "/etc/tine", forkHookDir:
		return true
	default:
		return foreign(path)
	}
}

// foreign are directories that are no part of the machine's files: the kernel's
// and those of run time.
func foreign(path string) bool {
	return path == "/proc" || path == "/sys" || path == "/dev" || path == "/run"
}

// changes answers VerbChanges.
func (a *Agent) changes(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.ChangesRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	upper, err := a.sys.upper()
	if err != nil {
		return nil, fmt.Errorf("changes: %w", err)
	}
	defer upper.Close() //nolint:errcheck // only read from
	w := &changeWalk{
		ctx:       ctx,
		left:      atMost(req.Limit, guestproto.MaxChanges),
		hashFile:  atMost(req.HashFile, maxHashFile),
		hashTotal: atMost(req.HashTotal, maxHashTotal),
		buf:       make([]byte, 64<<10),
		send: func(b []guestproto.Change) error {
			return st.SendMessage(ctx, &guestproto.Changes{Changes: b})
		},
	}
	if w.tmp, err = a.separateTmp(); err != nil {
		return nil, fmt.Errorf("changes: %w", categorize(err))
	}
	if w.tmp != nil {
		defer w.tmp.Close() //nolint:errcheck // only read from
	}
	if err = w.walk(upper, "", 0); err == nil {
		err = w.flush()
	}
	return &guestproto.ChangesDone{Truncated: w.truncated}, categorize(err)
}

// atMost is a limit that was asked for, or the agent's own.
func atMost[T int | int64](asked, own T) T {
	if asked <= 0 || asked > own {
		return own
	}
	return asked
}

// separateTmp opens /tmp if it is a file system of its own, which the image
// knows nothing of.
func (a *Agent) separateTmp() (*os.File, error) {
	var root, tmp unix.Stat_t
	if err := unix.Stat(a.path("/"), &root); err != nil {
		return nil, os.NewSyscallError("stat", err)
	}
	err := unix.Lstat(a.path(tmpDir), &tmp)
	if err != nil || tmp.Mode&unix.S_IFMT != unix.S_IFDIR || tmp.Dev == root.Dev {
		return nil, nil //nolint:nilnil // there is none, which is no error
	}
	fd, err := unix.Open(a.path(tmpDir), openDir, 0)
	if err != nil {
		return nil, os.NewSyscallError("open", err)
	}
	return os.NewFile(uintptr(fd), tmpDir), nil
}

// changeWalk goes over the directory of what is not the image's. Others change
// it meanwhile: what is gone when it is looked at was never there, and no
// symbolic link is followed.
type changeWalk struct {
	ctx       context.Context //nolint:containedctx // it lasts as long as the call that ctx bounds
	tmp       *os.File        // /tmp, if it is a file system of its own
	left      int             // entries that may still be told
	hashFile  int64
	hashTotal int64
	buf       []byte
	send      func([]guestproto.Change) error

	batch     []guestproto.Change
	size      int
	truncated bool
}

// walk tells what a directory holds, in order of whole paths as bytes: what is
// below a directory comes where its name with a slash would, which need not be
// right after the directory itself.
func (w *changeWalk) walk(dir *os.File, path string, depth int) error {
	names, err := w.names(dir, path)
	if err != nil {
		return err
	}
	steps := make([]string, 0, 2*len(names))
	for _, name := range names {
		steps = append(steps, name, name+"/")
	}
	slices.Sort(steps)
	below := map[string]bool{}
	for _, step := range steps {
		if err = context.Cause(w.ctx); err != nil {
			return err
		}
		name, descend := strings.CutSuffix(step, "/")
		child := path + "/" + name
		switch {
		case len(child) > guestproto.MaxChangePath || depth > maxTreeDepth:
			w.truncated = true
		case foreign(child):
		case !descend:
			below[name], err = w.look(dir, name, child)
		case below[name]:
			err = w.descend(dir, name, child, depth)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// names lists a directory, and no more of it than may be told.
func (w *changeWalk) names(dir *os.File, path string) ([]string, error) {
	most := w.left + 1 + skippedAtMost
	names, err := dir.Readdirnames(most)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	w.truncated = w.truncated || len(names) == most
	if path == "" && w.tmp != nil && !slices.Contains(names, tmpDir[1:]) {
		names = append(names, tmpDir[1:])
	}
	return names, nil
}

func (w *changeWalk) descend(dir *os.File, name, path string, depth int) error {
	if path == tmpDir && w.tmp != nil {
		return w.walk(w.tmp, path, depth+1)
	}
	fd, err := unix.Openat(int(dir.Fd()), name, openDir, 0)
	if isOneOf(err, unix.ENOENT, unix.ENOTDIR, unix.ELOOP) {
		return nil // it is another thing by now
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	sub := os.NewFile(uintptr(fd), path)
	defer sub.Close() //nolint:errcheck // only read from
	return w.walk(sub, path, depth+1)
}

// look tells what is at a name, and reports whether it is a directory.
func (w *changeWalk) look(dir *os.File, name, path string) (isDir bool, err error) {
	var st unix.Stat_t
	if path == tmpDir && w.tmp != nil {
		err = unix.Fstat(int(w.tmp.Fd()), &st)
	} else {
		err = unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
	if unchanged(path) {
		return isDir, nil
	}
	if w.left == 0 {
		w.truncated = true
		return false, nil
	}
	ch, err := w.describe(dir, name, path, &st)
	if err != nil {
		return false, err
	}
	w.left--
	return isDir, w.add(ch)
}

func (w *changeWalk) describe(dir *os.File, name, path string, st *unix.Stat_t) (guestproto.Change, error) {
	ch := guestproto.Change{
		Path: path, Mode: st.Mode & modeBits, UID: st.Uid, GID: st.Gid, MTime: st.Mtim.Nano(),
	}
	var err error
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFCHR && st.Rdev == 0: // as overlayfs remembers what is gone
		ch = guestproto.Change{Path: path, Kind: guestproto.ChangeDeleted}
	case kind == unix.S_IFREG:
		ch.Kind, ch.Size = guestproto.ChangeFile, st.Size
		err = w.hash(dir, name, &ch)
	case kind == unix.S_IFDIR:
		ch.Kind, ch.Opaque = guestproto.ChangeDirectory, opaque(dir, name)
	case kind == unix.S_IFLNK:
		ch.Kind = guestproto.ChangeSymlink
		target := make([]byte, guestproto.MaxChangePath)
		n, _ := unix.Readlinkat(int(dir.Fd()), name, target) // gone meanwhile: no target
		ch.Target = string(target[:max(n, 0)])
	}
	return ch, err
}

// opaque reports whether a directory hides what the image has in its place.
func opaque(dir *os.File, name string) bool {
	var value [1]byte
	n, err := unix.Lgetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name), opaqueXattr, value[:])
	return err == nil && n == 1 && value[0] == 'y'
}

// hash hashes a file that is small enough. One that cannot be opened, or that
// grows beyond the limit meanwhile, stays without.
func (w *changeWalk) hash(dir *os.File, name string, ch *guestproto.Change) error {
	most := min(w.hashFile, w.hashTotal)
	if ch.Size > most {
		return nil
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil //nolint:nilerr // a file without a hash is told as such
	}
	f := os.NewFile(uintptr(fd), ch.Path)
	defer f.Close() //nolint:errcheck // only read from
	if info, serr := f.Stat(); serr != nil || !info.Mode().IsRegular() {
		return nil //nolint:nilerr // as above
	}
	sum, total := sha256.New(), int64(0)
	for {
		if err = context.Cause(w.ctx); err != nil {
			return err
		}
		n, rerr := f.Read(w.buf)
		total += int64(n)
		w.hashTotal -= int64(n)
		_, _ = sum.Write(w.buf[:n]) // a hash takes all
		switch {
		case total > most, rerr != nil && !errors.Is(rerr, io.EOF):
			return nil
		case rerr != nil:
			ch.Size, ch.Hash = total, sum.Sum(nil)
			return nil
		}
	}
}

func (w *changeWalk) add(ch guestproto.Change) error {
	size := len(ch.Path) + len(ch.Target) + changeCost
	if w.size+size > maxBatch && len(w.batch) > 0 {
		if err := w.flush(); err != nil {
			return err
		}
	}
	w.batch = append(w.batch, ch)
	w.size += size
	return nil
}

func (w *changeWalk) flush() error {
	if len(w.batch) == 0 {
		return nil
	}
	err := w.send(w.batch)
	w.batch, w.size = nil, 0
	return err
}
