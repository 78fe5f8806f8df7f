package ext4

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	maxPath    = 4096
	maxSymlink = 4095
	direntSize = 8 // without the name
)

// Walk calls visit with the root directory, whose path is ".", and with all
// that is in it: each directory before what it holds, names in order. Of more
// than most names it returns errdef.ErrExhausted.
func (f *FS) Walk(ctx context.Context, most int, visit func(path string, in *Inode) error) error {
	root, err := f.inode(rootInode)
	if err != nil {
		return fmt.Errorf("root directory: %w", err)
	}
	if root.Type != Dir {
		return invalid("the root is not a directory")
	}
	t := &traveller{FS: f, ctx: ctx, visit: visit, left: most, entered: map[uint32]bool{}}
	if err = visit(".", root); err != nil {
		return err
	}
	return t.enter("", root)
}

type traveller struct {
	*FS
	ctx     context.Context // the walk is one call
	visit   func(string, *Inode) error
	left    int
	entered map[uint32]bool
}

// enter visits what is in a directory, whose path ends in a slash unless it is
// the root's.
func (t *traveller) enter(path string, dir *Inode) error {
	if t.entered[dir.Number] {
		return invalid("directory %.200q is within itself, or has two names", path)
	}
	t.entered[dir.Number] = true
	names, err := t.list(dir)
	if err != nil {
		return fmt.Errorf("directory %.200q: %w", "/"+path, err)
	}
	for _, e := range names {
		if t.ctx.Err() != nil {
			return context.Cause(t.ctx)
		}
		at := path + e.name
		if len(at) > maxPath {
			return invalid("a path of more than %d bytes: %.200q", maxPath, at)
		}
		in, err := t.inode(e.inode)
		if err != nil {
			return fmt.Errorf("%.200q: %w", "/"+at, err)
		}
		if err = t.visit(at, in); err != nil {
			return err
		}
		if in.Type == Dir {
			if err = t.enter(at+"/", in); err != nil {
				return err
			}
		}
	}
	return nil
}

// dirent is a name in a directory.
type dirent struct {
	name  string
	inode uint32
}

// list returns what is in a directory, by name. An index that it may have is in
// what is no name for whoever reads it from its beginning.
func (t *traveller) list(dir *Inode) ([]dirent, error) {
	var names []dirent
	buf := make([]byte, t.blockSize)
	err := t.runs(dir, uint64(dir.Size)/t.blockSize, func(r run) error {
		for i := range r.n {
			if t.ctx.Err() != nil {
				return context.Cause(t.ctx)
			}
			if err := t.block(r.at+i, buf); err != nil {
				return err
			}
			before := len(names)
			var err error
			if names, err = appendNames(names, buf); err != nil {
				return err
			}
			if t.left -= len(names) - before; t.left < 0 {
				return fmt.Errorf("%w: too many names", errdef.ErrExhausted)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(names, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	for i := 1; i < len(names); i++ {
		if names[i].name == names[i-1].name {
			return nil, invalid("%.200q is in it twice", names[i].name)
		}
	}
	return names, nil
}

// appendNames reads a block of a directory.
func appendNames(names []dirent, block []byte) ([]dirent, error) {
	for len(block) > 0 {
		if len(block) < direntSize {
			return nil, invalid("the directory is damaged")
		}
		inode, length, nameLen := u32(block, 0), int(u16(block, 4)), int(block[6])
		if length == 0xFFFF || length == 0 && len(block) == 1<<16 {
			length = 1 << 16 // which 16 bits cannot say
		}
		if length < direntSize || length%4 != 0 || length > len(block) || nameLen > length-direntSize {
			return nil, invalid("the directory is damaged")
		}
		name := string(block[direntSize : direntSize+nameLen])
		block = block[length:]
		if inode == 0 || name == "." || name == ".." {
			continue
		}
		if name == "" || strings.ContainsAny(name, "/\x00") {
			return nil, invalid("the directory has the name %q", name)
		}
		names = append(names, dirent{name, inode})
	}
	return names, nil
}

// Readlink returns where a symbolic link leads.
func (f *FS) Readlink(in *Inode) (string, error) {
	if in.Size == 0 || in.Size > maxSymlink {
		return "", invalid("inode %d: a link to %d bytes", in.Number, in.Size)
	}
	target := in.body[:]
	if in.flags&flagExtents != 0 || in.Size >= int64(len(in.body)) {
		target = make([]byte, (maxSymlink/f.blockSize+1)*f.blockSize)
		if err := f.runs(in, uint64(len(target))/f.blockSize, func(r run) error {
			for i := range r.n {
				if err := f.block(r.at+i, target[(r.first+i)*f.blockSize:]); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return "", fmt.Errorf("inode %d: %w", in.Number, err)
		}
	}
	text := string(target[:in.Size])
	if strings.Contains(text, "\x00") {
		return "", invalid("inode %d: a link to a name with a zero byte", in.Number)
	}
	return text, nil
}
