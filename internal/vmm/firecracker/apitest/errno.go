package apitest

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// errnoOf is the number under an error of package os.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		errno = unix.EIO
	}
	return errno
}

// describe is musl's text, with which Firecracker is built, where it differs from
// Go's; all texts begin with a capital there.
func describe(errno unix.Errno) string {
	switch errno {
	case unix.EADDRINUSE:
		return "Address in use"
	case unix.ENOSPC:
		return "No space left on device"
	}
	text := errno.Error()
	return strings.ToUpper(text[:1]) + text[1:]
}
