package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const (
	maxWatches = 8192
	watchMask  = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE |
		unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
)

// watch answers VerbWatch.
func (a *Agent) watch(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.WatchRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	who, path, err := a.locate(req.User, req.Path)
	if err != nil {
		return nil, err
	}
	w, err := newWatcher(who, path, req.Recursive)
	if err != nil {
		return nil, err
	}
	defer w.inotify.Close() //nolint:errcheck // only read from
	if err = st.SendMessage(ctx, &guestproto.Empty{}); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = w.inotify.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = w.run(func(batch []guestproto.Event) error {
		return st.SendMessage(ctx, &guestproto.Events{Events: batch})
	})
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return &guestproto.Empty{}, err
}

// watcher turns inotify's events, of one directory each, into those of a tree.
type watcher struct {
	inotify   *os.File
	who       *account
	root      string
	recursive bool
	dirs      map[int32]string // watched directories, relative to root

	batch []guestproto.Event
}

func newWatcher(who *account, root string, recursive bool) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, categorize(os.NewSyscallError("inotify_init1", err))
	}
	w := &watcher{inotify: os.NewFile(uintptr(fd), "inotify"), who: who, root: root, recursive: recursive, dirs: map[int32]string{}}
	if err = who.do(func() error { return w.add("", false) }); err != nil {
		_ = w.inotify.Close()
		return nil, categorize(err)
	}
	return w, nil
}

// add watches what is at rel, and below it if it is to. With tell, what is
// found below is reported as new: it was made before the watch stood.
func (w *watcher) add(rel string, tell bool) error {
	full := filepath.Join(w.root, rel)
	if len(w.dirs) >= maxWatches {
		return failf(errdef.ErrExhausted, "watch %s: more than %d directories", w.root, maxWatches)
	}
	wd, err := control(w.inotify, func(fd int) (int, error) { return unix.InotifyAddWatch(fd, full, watchMask) })
	if err != nil {
		return &os.PathError{Op: "watch", Path: full, Err: err}
	}
	w.dirs[int32(wd)] = rel
	if !w.recursive {
		return nil
	}
	entries, err := os.ReadDir(full)
	if errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	return w.addAll(rel, entries, tell)
}

func (w *watcher) addAll(rel string, entries []fs.DirEntry, tell bool) error {
	for _, e := range entries {
		child := filepath.Join(rel, e.Name())
		if tell {
			w.push(guestproto.EventCreate, child)
		}
		if !e.IsDir() {
			continue
		}
		err := w.add(child, tell)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
			return err
		}
	}
	return nil
}

// run reports events until the watched file is gone or send fails.
func (w *watcher) run(send func([]guestproto.Event) error) error {
	buf := make([]byte, 16<<10)
	for {
		n, err := w.inotify.Read(buf)
		if err != nil {
			return err
		}
		over, err := w.digest(buf[:n])
		for len(w.batch) > 0 && err == nil {
			part := w.batch[:min(len(w.batch), fitting(w.batch))]
			w.batch = w.batch[len(part):]
			err = send(part)
		}
		if err != nil || over {
			return err
		}
	}
}

// fitting is how many events fit in one message.
func fitting(events []guestproto.Event) int {
	size := 0
	for i, e := range events {
		if size += len(e.Path) + 16; size > maxBatch && i > 0 {
			return i
		}
	}
	return len(events)
}

// digest reads the kernel's records; over says that the root is gone.
func (w *watcher) digest(b []byte) (over bool, err error) {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		name := b[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+size]
		b = b[unix.SizeofInotifyEvent+size:]
		name, _, _ = bytes.Cut(name, []byte{0})
		gone, err := w.event(wd, mask, string(name))
		if err != nil {
			return over, err
		}
		over = over || gone
	}
	return over, nil
}

func (w *watcher) event(wd int32, mask uint32, name string) (over bool, err error) {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		w.push(guestproto.EventOverflow, "")
		return false, nil
	}
	dir, known := w.dirs[wd]
	if !known {
		return false, nil
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(w.dirs, wd)
		return dir == "", nil
	}
	if mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0 {
		return w.selfGone(wd, mask, dir), nil
	}
	rel := filepath.Join(dir, name)
	w.push(eventType(mask), rel)
	if mask&unix.IN_ISDIR != 0 && mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0 && w.recursive {
		err = w.who.do(func() error { return w.add(rel, true) })
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			err = nil
		}
	}
	return false, err
}

// selfGone deals with a watched directory that was removed or moved. That of a
// subdirectory was reported by its parent.
func (w *watcher) selfGone(wd int32, mask uint32, dir string) (over bool) {
	if dir == "" {
		w.push(eventType(mask), "")
		return true
	}
	if mask&unix.IN_MOVE_SELF == 0 {
		return false
	}
	// If it moved within the tree it has been added anew under its new name,
	// with this same watch; if not, its events mean nothing any more.
	if _, err := os.Lstat(filepath.Join(w.root, dir)); err != nil {
		delete(w.dirs, wd)
		_, _ = control(w.inotify, func(fd int) (int, error) { return unix.InotifyRmWatch(fd, uint32(wd)) })
	}
	return false
}

func eventType(mask uint32) guestproto.EventType {
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return guestproto.EventCreate
	case mask&(unix.IN_DELETE|unix.IN_DELETE_SELF) != 0:
		return guestproto.EventRemove
	case mask&(unix.IN_MOVED_FROM|unix.IN_MOVE_SELF) != 0:
		return guestproto.EventRename
	case mask&unix.IN_ATTRIB != 0:
		return guestproto.EventChmod
	default:
		return guestproto.EventWrite
	}
}

// push adds an event, unless it repeats the last.
func (w *watcher) push(t guestproto.EventType, rel string) {
	e := guestproto.Event{Type: t, Path: rel}
	if n := len(w.batch); n == 0 || w.batch[n-1] != e {
		w.batch = append(w.batch, e)
	}
}
