package guest

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/tinevm/tine/internal/guestproto"
)

// maxListing bounds what the host keeps of one listing.
const maxListing = 64 << 20

// ReadOptions say which part of a file to read, and as whom.
type ReadOptions struct {
	User   string
	Offset int64
	Limit  int64 // 0 is no limit
}

// File is an open file of the guest, being read.
type File struct {
	client *Client
	stream *guestproto.Stream
	ctx    context.Context
	entry  Entry
	rest   []byte
	err    error
}

// ReadFile opens a regular file of the guest. ctx bounds all reading of it. The
// caller must close it.
func (c *Client) ReadFile(ctx context.Context, path string, opts ReadOptions) (*File, error) {
	st, err := c.session.Open(ctx, guestproto.VerbRead, &guestproto.ReadRequest{
		Path: path, User: opts.User, Offset: opts.Offset, Limit: opts.Limit,
	}, true)
	if err != nil {
		return nil, c.explain(err)
	}
	chunk, err := c.recv(ctx, st)
	if err != nil {
		return nil, err
	}
	f := &File{client: c, stream: st, ctx: ctx}
	if err = c.decode(st, chunk, &f.entry); err != nil {
		return nil, err
	}
	return f, nil
}

// Entry describes the file, as it was when it was opened.
func (f *File) Entry() Entry { return f.entry }

// Read reads the file's bytes as they come from the guest.
func (f *File) Read(p []byte) (int, error) {
	for len(f.rest) == 0 && f.err == nil {
		chunk, err := f.client.recv(f.ctx, f.stream)
		switch {
		case err != nil:
			f.err = err
		case chunk.Final:
			f.err = io.EOF
		default:
			f.rest = chunk.Data
		}
	}
	if len(f.rest) == 0 {
		return 0, f.err
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

// Close ends the reading.
func (f *File) Close() error {
	f.stream.Reset(guestproto.CodeCanceled, "closed")
	return nil
}

// WriteOptions say how to write a file, and as whom.
type WriteOptions struct {
	User    string
	Mode    uint32 // 0 is 0644 for a new file, and an old one's own
	Append  bool
	Parents bool // make missing directories
	Create  bool // fail when the file exists
}

// WriteFile writes a file of the guest from r. Unless it appends, the file is
// replaced in one move when r has ended, and on any error it stays as it was.
func (c *Client) WriteFile(ctx context.Context, path string, opts WriteOptions, r io.Reader) (Entry, error) {
	st, err := c.session.Open(ctx, guestproto.VerbWrite, &guestproto.WriteRequest{
		Path: path, User: opts.User, Mode: opts.Mode, Append: opts.Append, Parents: opts.Parents, Create: opts.Create,
	}, false)
	if err != nil {
		return Entry{}, c.explain(err)
	}
	var e Entry
	if err = c.upload(ctx, st, r); err == nil {
		err = c.last(ctx, st, &e)
	}
	if err != nil {
		st.Reset(guestproto.CodeCanceled, "canceled")
	}
	return e, err
}

// upload sends all of r. When the guest gave up meanwhile, its reason is the
// error.
func (c *Client) upload(ctx context.Context, st *guestproto.Stream, r io.Reader) error {
	buf := make([]byte, guestproto.MaxData)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, serr := st.Send(ctx, guestproto.ChanStdin, buf[:n]); serr != nil {
				return c.explain(serr)
			}
		}
		if errors.Is(err, io.EOF) {
			return c.explain(st.End(ctx, nil))
		}
		if err != nil {
			return fmt.Errorf("read what is to be written: %w", err)
		}
	}
}

// Stat describes a file, not what it points to. Relative paths start at the
// home of user, "" being root.
func (c *Client) Stat(ctx context.Context, path, user string) (Entry, error) {
	var e Entry
	err := c.call(ctx, guestproto.VerbStat, &guestproto.PathRequest{Path: path, User: user}, &e)
	return e, err
}

// ListOptions say how much to list, and as whom.
type ListOptions struct {
	User  string
	Depth int // 0 or 1 is the directory's own entries
	Limit int // 0 is the agent's limit
}

// List lists a directory, each directory before what it holds. truncated says
// that there is more than the limit.
func (c *Client) List(ctx context.Context, path string, opts ListOptions) (entries []Entry, truncated bool, err error) {
	st, err := c.session.Open(ctx, guestproto.VerbList, &guestproto.ListRequest{
		Path: path, User: opts.User, Depth: opts.Depth, Limit: opts.Limit,
	}, true)
	if err != nil {
		return nil, false, c.explain(err)
	}
	for size := 0; size <= maxListing; {
		chunk, err := c.recv(ctx, st)
		if err != nil {
			return nil, false, err
		}
		size += len(chunk.Data) + guestproto.FrameCost
		if chunk.Final {
			var done guestproto.ListDone
			err = c.decode(st, chunk, &done)
			return entries, done.Truncated, err
		}
		var part guestproto.Entries
		if err = c.decode(st, chunk, &part); err != nil {
			return nil, false, err
		}
		entries = append(entries, part.Entries...)
	}
	return nil, false, c.broke(st, "listing is too long")
}

// MkdirOptions say how to make a directory, and as whom.
type MkdirOptions struct {
	User    string
	Mode    uint32 // 0 is 0755
	Parents bool   // make missing parents; an existing directory is fine
}

// Mkdir makes a directory.
func (c *Client) Mkdir(ctx context.Context, path string, opts MkdirOptions) error {
	return c.call(ctx, guestproto.VerbMkdir, &guestproto.MkdirRequest{
		Path: path, User: opts.User, Mode: opts.Mode, Parents: opts.Parents,
	}, &guestproto.Empty{})
}

// Move renames a file or directory, within one file system.
func (c *Client) Move(ctx context.Context, from, to, user string) error {
	return c.call(ctx, guestproto.VerbMove, &guestproto.MoveRequest{From: from, To: to, User: user}, &guestproto.Empty{})
}

// Remove removes a file or an empty directory; with recursive, a directory and
// all that it holds.
func (c *Client) Remove(ctx context.Context, path, user string, recursive bool) error {
	return c.call(ctx, guestproto.VerbRemove, &guestproto.RemoveRequest{Path: path, User: user, Recursive: recursive}, &guestproto.Empty{})
}

// Watcher tells of changes to files in the guest.
type Watcher struct {
	client *Client
	stream *guestproto.Stream
	events []Event
}

// Watch begins to watch a directory or file; changes after it returns are told.
// The caller must close the Watcher.
func (c *Client) Watch(ctx context.Context, path, user string, recursive bool) (*Watcher, error) {
	st, err := c.session.Open(ctx, guestproto.VerbWatch, &guestproto.WatchRequest{Path: path, User: user, Recursive: recursive}, true)
	if err != nil {
		return nil, c.explain(err)
	}
	chunk, err := c.recv(ctx, st)
	if err != nil {
		return nil, err
	}
	if err = c.decode(st, chunk, &guestproto.Empty{}); err != nil {
		return nil, err
	}
	return &Watcher{client: c, stream: st}, nil
}

// Next waits for the next change. It returns io.EOF when what was watched is
// gone. A ctx that ends ends the wait only.
func (w *Watcher) Next(ctx context.Context) (Event, error) {
	for len(w.events) == 0 {
		chunk, err := w.stream.Recv(ctx)
		if err != nil {
			if errors.Is(err, io.EOF) {
				return Event{}, w.client.broke(w.stream, "stream without an end")
			}
			return Event{}, w.client.explain(err)
		}
		if chunk.Final {
			return Event{}, io.EOF
		}
		var part guestproto.Events
		if err = w.client.decode(w.stream, chunk, &part); err != nil {
			return Event{}, err
		}
		w.events = part.Events
	}
	e := w.events[0]
	w.events = w.events[1:]
	return e, nil
}

// Close ends the watching.
func (w *Watcher) Close() error {
	w.stream.Reset(guestproto.CodeCanceled, "closed")
	return nil
}
