package agent

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// categorized is an error in a category that its words need not repeat.
type categorized struct {
	error
	category error
}

func (c *categorized) Unwrap() []error { return []error{c.error, c.category} }

// failf returns an error in a category.
func failf(category error, format string, args ...any) error {
	return &categorized{error: fmt.Errorf(format, args...), category: category}
}

// categorize puts an error of the kernel into a category, unless it is in one.
func categorize(err error) error {
	if err == nil || errdef.Code(err) != "internal" {
		return err
	}
	if category := categoryOf(err); category != nil {
		return &categorized{error: err, category: category}
	}
	return err
}

func categoryOf(err error) error {
	switch {
	case isOneOf(err, unix.ENOTEMPTY, unix.EBUSY, unix.ETXTBSY):
		return errdef.ErrConflict
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
		return errdef.ErrNotFound
	case errors.Is(err, os.ErrExist):
		return errdef.ErrExists
	case errors.Is(err, os.ErrPermission), errors.Is(err, unix.EROFS):
		return errdef.ErrDenied
	case isOneOf(err, unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN):
		return errdef.ErrExhausted
	case isOneOf(err, unix.EINVAL, unix.ENOTDIR, unix.EISDIR, unix.ENAMETOOLONG, unix.ELOOP, unix.EXDEV, unix.E2BIG, unix.ENOEXEC):
		return errdef.ErrInvalid
	}
	return nil
}

func isOneOf(err error, errnos ...unix.Errno) bool {
	for _, e := range errnos {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
