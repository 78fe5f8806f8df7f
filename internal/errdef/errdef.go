// Package errdef names the categories of error that Tine's layers agree on.
//
// A category is a sentinel that an error wraps: callers test it with errors.Is,
// and one table each in api and cli turns it into an HTTP status and an exit
// code. An error in no category is an internal error. The package also carries
// hints: a sentence that tells a person what to do next.
package errdef

import "errors"

// The categories. An error belongs to at most one of them.
var (
	// ErrNotFound: the named object does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists: an object of that name exists already.
	ErrExists = errors.New("already exists")
	// ErrInvalid: the request is wrong whatever the state of the system.
	ErrInvalid = errors.New("invalid")
	// ErrConflict: the request clashes with the present state of the object.
	ErrConflict = errors.New("conflict")
	// ErrDenied: the caller may not do this.
	ErrDenied = errors.New("denied")
	// ErrExhausted: a limit or a resource has run out; later it may work.
	ErrExhausted = errors.New("exhausted")
	// ErrUnavailable: something this needs is not there, or went away.
	ErrUnavailable = errors.New("unavailable")
	// ErrUnsupported: this engine or host cannot do it at all.
	ErrUnsupported = errors.New("unsupported")
	// ErrTimeout: a bound that the caller set on the work has passed.
	ErrTimeout = errors.New("timed out")
)

// categories in the order in which Code looks for them.
var categories = []struct {
	err  error
	code string
}{
	{ErrNotFound, "not_found"},
	{ErrExists, "exists"},
	{ErrInvalid, "invalid"},
	{ErrConflict, "conflict"},
	{ErrDenied, "denied"},
	{ErrExhausted, "exhausted"},
	{ErrUnavailable, "unavailable"},
	{ErrUnsupported, "unsupported"},
	{ErrTimeout, "timeout"},
}

// Code returns the stable word for err's category, as error bodies and the
// guest protocol carry it; "internal" when err is in none.
func Code(err error) string {
	for _, c := range categories {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return "internal"
}

// FromCode returns the category that Code names, or nil for "internal" and
// for words this version does not know.
func FromCode(code string) error {
	for _, c := range categories {
		if c.code == code {
			return c.err
		}
	}
	return nil
}

// Remote rebuilds an error that crossed a process boundary as a code and a
// message: it prints as message and is in the category that code names.
func Remote(code, message string) error {
	return &remote{message: message, category: FromCode(code)}
}

type remote struct {
	message  string
	category error
}

func (e *remote) Error() string { return e.message }
func (e *remote) Unwrap() error { return e.category }

// WithHint returns err with a sentence that tells a person what to do about
// it. The hint is not part of err.Error(); read it with Hint.
func WithHint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hinted{error: err, hint: hint}
}

// Hint returns the outermost hint in err's chain, or "".
func Hint(err error) string {
	if h, ok := errors.AsType[*hinted](err); ok {
		return h.hint
	}
	return ""
}

type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }
