package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const (
	maxEntries   = 20_000   // of one listing
	maxDepth     = 64       // of a listing
	maxBatch     = 24 << 10 // bytes of entries or events in one message
	defaultMode  = 0o644
	defaultDir   = 0o755
	modeBits     = 0o7777
	tempPrefix   = ".tine-"
	maxTempTries = 100
)

func (a *Agent) fileHandler(v guestproto.Verb) handler {
	switch v {
	case guestproto.VerbRead:
		return a.readFile
	case guestproto.VerbWrite:
		return a.writeFile
	case guestproto.VerbStat:
		return a.stat
	case guestproto.VerbList:
		return a.list
	case guestproto.VerbMkdir:
		return a.mkdir
	case guestproto.VerbMove:
		return a.move
	case guestproto.VerbRemove:
		return a.remove
	case guestproto.VerbWatch:
		return a.watch
	default:
		return nil
	}
}

// locate finds the user that a request names, and what its path means to them.
func (a *Agent) locate(user, path string) (*account, string, error) {
	who, err := a.account(user)
	if err != nil {
		return nil, "", err
	}
	if path == "" {
		return nil, "", failf(errdef.ErrInvalid, "the path is empty")
	}
	return who, absolute(path, who.home), nil
}

// names turns ids into names, looking each up once.
type names struct {
	users, groups map[uint32]string
}

func newNames() *names {
	return &names{users: map[uint32]string{}, groups: map[uint32]string{}}
}

func lookup(cache map[uint32]string, file string, id uint32) string {
	name, ok := cache[id]
	if !ok {
		name = nameOf(file, id)
		cache[id] = name
	}
	return name
}

// entry describes the file at path, not what it points to.
func (n *names) entry(path string) (guestproto.Entry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return guestproto.Entry{}, categorize(&os.PathError{Op: "stat", Path: path, Err: err})
	}
	e := guestproto.Entry{
		Name: filepath.Base(path), Path: path, Size: st.Size, Mode: st.Mode & modeBits,
		UID: st.Uid, GID: st.Gid, User: lookup(n.users, "/etc/passwd", st.Uid), Group: lookup(n.groups, "/etc/group", st.Gid),
		MTime: st.Mtim.Nano(),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Type = guestproto.TypeFile
	case unix.S_IFDIR:
		e.Type = guestproto.TypeDirectory
	case unix.S_IFLNK:
		e.Type = guestproto.TypeSymlink
		e.Target, _ = os.Readlink(path) // gone meanwhile: no target
	}
	return e, nil
}

// stat answers VerbStat.
func (a *Agent) stat(_ context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.PathRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, path, err := a.locate(req.User, req.Path)
	if err != nil {
		return nil, err
	}
	var e guestproto.Entry
	err = who.do(func() (err error) {
		e, err = newNames().entry(path)
		return err
	})
	return &e, err
}

// readFile answers VerbRead.
func (a *Agent) readFile(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.ReadRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, path, err := a.locate(req.User, req.Path)
	if err != nil {
		return nil, err
	}
	f, e, err := openRegular(who, path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	if req.Offset != 0 {
		if _, err = f.Seek(req.Offset, io.SeekStart); err != nil {
			return nil, categorize(err)
		}
	}
	if err = st.SendMessage(ctx, &e); err != nil {
		return nil, err
	}
	var from io.Reader = f
	if req.Limit > 0 {
		from = io.LimitReader(f, req.Limit)
	}
	return &guestproto.Empty{}, sendAll(ctx, st, from)
}

// openRegular opens a regular file for reading. Others could block, or never
// end.
func openRegular(who *account, path string) (f *os.File, e guestproto.Entry, err error) {
	err = who.do(func() error {
		var operr error
		if f, operr = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); operr != nil {
			return categorize(operr)
		}
		e, operr = describeOpen(f, path)
		if operr != nil {
			_ = f.Close()
		}
		return operr
	})
	return f, e, err
}

func describeOpen(f *os.File, path string) (guestproto.Entry, error) {
	info, err := f.Stat()
	if err != nil {
		return guestproto.Entry{}, categorize(err)
	}
	if !info.Mode().IsRegular() {
		return guestproto.Entry{}, failf(errdef.ErrInvalid, "read %s: not a regular file", path)
	}
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return guestproto.Entry{}, categorize(err)
	}
	return newNames().entry(target)
}

// sendAll sends the rest of a file.
func sendAll(ctx context.Context, st *guestproto.Stream, from io.Reader) error {
	buf := make([]byte, guestproto.MaxData)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, serr := st.Send(ctx, guestproto.ChanStdout, buf[:n]); serr != nil {
				return serr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return categorize(err)
		}
	}
}

// writeFile answers VerbWrite. A regular file is replaced in one move when all
// its bytes have come; until then it stays as it was.
func (a *Agent) writeFile(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.WriteRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, path, err := a.locate(req.User, req.Path)
	if err != nil {
		return nil, err
	}
	w := &writing{agent: a, who: who, req: &req}
	if err = who.do(func() error { return w.open(path) }); err != nil {
		return nil, fmt.Errorf("write %s: %w", path, categorize(err))
	}
	if err = receiveAll(ctx, st, w.file); err == nil {
		err = categorize(w.file.Close())
	} else {
		_ = w.file.Close() // the first error counts
	}
	var e guestproto.Entry
	err = who.do(func() (derr error) {
		if err == nil {
			err = categorize(w.commit())
		}
		if err != nil {
			w.discard()
			return err
		}
		e, derr = newNames().entry(w.path)
		return derr
	})
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", path, err)
	}
	return &e, nil
}

// receiveAll writes what the host sends to a file.
func receiveAll(ctx context.Context, st *guestproto.Stream, to io.Writer) error {
	for {
		c, err := st.Recv(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if c.Channel != guestproto.ChanStdin {
			continue
		}
		if _, err = to.Write(c.Data); err != nil {
			return categorize(err)
		}
	}
}

// writing is a file on its way to its place.
type writing struct {
	agent *Agent
	who   *account
	req   *guestproto.WriteRequest
	path  string // where it goes, symbolic links followed
	temp  string // where it is until then; "" when it is written in place
	file  *os.File
}

// open decides how to write, and begins.
func (w *writing) open(path string) error {
	w.path = path
	if target, err := filepath.EvalSymlinks(path); err == nil {
		w.path = target
	}
	if w.req.Parents {
		if err := os.MkdirAll(filepath.Dir(w.path), defaultDir); err != nil {
			return err
		}
	}
	old, err := os.Stat(w.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	exists := err == nil
	switch {
	case exists && w.req.Create:
		return unix.EEXIST
	case exists && old.IsDir():
		return unix.EISDIR
	case w.req.Append, exists && !old.Mode().IsRegular():
		return w.openInPlace(os.O_APPEND)
	}
	err = w.openTemp(old)
	if exists && errors.Is(err, os.ErrPermission) {
		// The user may write the file, but not its directory.
		return w.openInPlace(os.O_TRUNC)
	}
	return err
}

func (w *writing) mode() os.FileMode {
	if w.req.Mode == 0 {
		return defaultMode
	}
	return fileMode(w.req.Mode)
}

// fileMode turns the bits of st_mode into what package os has for them.
func fileMode(bits uint32) os.FileMode {
	m := os.FileMode(bits & 0o777)
	for bit, flag := range map[uint32]os.FileMode{
		unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky,
	} {
		if bits&bit != 0 {
			m |= flag
		}
	}
	return m
}

func (w *writing) openInPlace(how int) (err error) {
	w.file, err = os.OpenFile(w.path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK|how, w.mode())
	return err
}

// openTemp makes a new file beside the old one, with its mode and owner.
func (w *writing) openTemp(old os.FileInfo) error {
	var err error
	for range maxTempTries {
		w.temp = filepath.Join(filepath.Dir(w.path), tempPrefix+strconv.FormatUint(w.agent.temps.Add(1), 36))
		w.file, err = os.OpenFile(w.temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if !errors.Is(err, os.ErrExist) {
			break
		}
	}
	if err != nil {
		w.temp = ""
		return err
	}
	if err = w.dress(old); err != nil {
		_ = w.file.Close()
		w.discard()
	}
	return err
}

// dress gives the new file the owner and mode that it must have.
func (w *writing) dress(old os.FileInfo) error {
	mode := w.mode()
	if old != nil && w.req.Mode == 0 {
		mode = old.Mode()
	}
	if old != nil {
		var st unix.Stat_t
		if err := unix.Stat(w.path, &st); err != nil {
			return err
		}
		// Only root may give files away; for others the file becomes theirs.
		if err := w.file.Chown(int(st.Uid), int(st.Gid)); err != nil && !errors.Is(err, os.ErrPermission) {
			return err
		}
	}
	return w.file.Chmod(mode)
}

// commit moves the file to its place.
func (w *writing) commit() error {
	if w.temp == "" {
		return nil
	}
	flags := uint(0)
	if w.req.Create {
		flags = unix.RENAME_NOREPLACE
	}
	return unix.Renameat2(unix.AT_FDCWD, w.temp, unix.AT_FDCWD, w.path, flags)
}

// discard removes what is not to be.
func (w *writing) discard() {
	if w.temp != "" {
		_ = os.Remove(w.temp) // the error that led here counts
	}
}

// list answers VerbList.
func (a *Agent) list(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.ListRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, path, err := a.locate(req.User, req.Path)
	if err != nil {
		return nil, err
	}
	l := &listing{names: newNames(), left: maxEntries, send: func(b []guestproto.Entry) error {
		return st.SendMessage(ctx, &guestproto.Entries{Entries: b})
	}}
	if req.Limit > 0 {
		l.left = min(req.Limit, maxEntries)
	}
	err = who.do(func() error {
		if lerr := l.walk(path, min(max(req.Depth, 1), maxDepth)); lerr != nil {
			return lerr
		}
		return l.flush()
	})
	if err != nil {
		return nil, err
	}
	return &guestproto.ListDone{Truncated: l.truncated}, nil
}

// listing is a directory tree on its way to the host.
type listing struct {
	names     *names
	send      func([]guestproto.Entry) error
	left      int
	batch     []guestproto.Entry
	size      int
	truncated bool
}

// walk lists a directory, and those in it, depth levels deep.
func (l *listing) walk(dir string, depth int) error {
	children, err := l.readDir(dir)
	if err != nil {
		return err
	}
	for _, name := range children {
		e, err := l.names.entry(filepath.Join(dir, name))
		if errors.Is(err, errdef.ErrNotFound) {
			continue // gone since it was read
		}
		if err != nil {
			return err
		}
		if l.left == 0 {
			l.truncated = true
			return nil
		}
		l.left--
		if err = l.add(e); err != nil {
			return err
		}
		if e.Type != guestproto.TypeDirectory || depth < 2 {
			continue
		}
		// A directory that may not be read is listed, but not what it holds.
		err = l.walk(e.Path, depth-1)
		if err != nil && !errors.Is(err, errdef.ErrDenied) && !errors.Is(err, errdef.ErrNotFound) {
			return err
		}
	}
	return nil
}

// readDir returns a directory's names in order, and no more than may be told.
func (l *listing) readDir(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, categorize(err)
	}
	defer f.Close() //nolint:errcheck // only read from
	children, err := f.Readdirnames(l.left + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, categorize(err)
	}
	slices.Sort(children)
	return children, nil
}

func (l *listing) add(e guestproto.Entry) error {
	size := len(guestproto.Encode(&e)) + 3
	if l.size+size > maxBatch && len(l.batch) > 0 {
		if err := l.flush(); err != nil {
			return err
		}
	}
	l.batch = append(l.batch, e)
	l.size += size
	return nil
}

func (l *listing) flush() error {
	if len(l.batch) == 0 {
		return nil
	}
	err := l.send(l.batch)
	l.batch, l.size = nil, 0
	return err
}

// mkdir answers VerbMkdir.
func (a *Agent) mkdir(_ context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.MkdirRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, path, err := a.locate(req.User, req.Path)
	if err != nil {
		return nil, err
	}
	err = who.do(func() error {
		if req.Parents {
			if merr := os.MkdirAll(filepath.Dir(path), defaultDir); merr != nil {
				return merr
			}
		}
		merr := os.Mkdir(path, defaultDir)
		if req.Parents && errors.Is(merr, os.ErrExist) {
			return mustBeDir(path, merr)
		}
		if merr == nil && req.Mode != 0 {
			merr = os.Chmod(path, fileMode(req.Mode))
		}
		return merr
	})
	return &guestproto.Empty{}, categorize(err)
}

func mustBeDir(path string, otherwise error) error {
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		return nil
	}
	return otherwise
}

// move answers VerbMove.
func (a *Agent) move(_ context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.MoveRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, from, err := a.locate(req.User, req.From)
	if err != nil {
		return nil, err
	}
	_, to, err := a.locate(req.User, req.To)
	if err != nil {
		return nil, err
	}
	err = who.do(func() error { return os.Rename(from, to) })
	return &guestproto.Empty{}, categorize(err)
}

// remove answers VerbRemove.
func (a *Agent) remove(_ context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.RemoveRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, path, err := a.locate(req.User, req.Path)
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, failf(errdef.ErrInvalid, "remove /: it is the root")
	}
	err = who.do(func() error {
		if !req.Recursive {
			return os.Remove(path)
		}
		if _, serr := os.Lstat(path); serr != nil {
			return serr
		}
		return os.RemoveAll(path)
	})
	return &guestproto.Empty{}, categorize(err)
}
