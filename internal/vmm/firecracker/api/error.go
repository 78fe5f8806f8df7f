package api

import (
	"fmt"
	"net/http"
	"strings"
	"unicode"

	"github.com/tinevm/tine/internal/errdef"
)

// Error is Firecracker's refusal of a request. It unwraps to a category where
// the answer tells one:
//
//   - ErrConflict: the machine is not in a state for this request
//   - ErrUnsupported: this Firecracker does not know the request, or a field of it
//   - ErrInvalid: a value in the request is of the wrong kind or out of range
//   - ErrExhausted: too many connections, or no space left where it writes
//
// Firecracker answers 400 to nearly everything, so it is told from the words.
// They are those of src/vmm/src/rpc_interface.rs, of api_server in
// src/firecracker/src and of serde_json, and have not changed from v1.10 to
// v1.16. An Error with other words is in no category.
type Error struct {
	Method, Path string // the request
	Status       int    // HTTP's
	// Message is Firecracker's fault_message: printable, and at most 1 KiB of it.
	Message string
}

// maxMessage bounds what is kept of a fault message, in bytes.
const maxMessage = 1 << 10

// Error names the request, the status and the message.
func (e *Error) Error() string {
	message := e.Message
	if message == "" {
		message = "no reason given"
	}
	return fmt.Sprintf("Firecracker refused %s %s with status %d: %s", e.Method, e.Path, e.Status, message)
}

// Unwrap returns the category, or nil.
func (e *Error) Unwrap() error {
	if e.Status == http.StatusServiceUnavailable {
		return errdef.ErrExhausted
	}
	for _, c := range words {
		if strings.Contains(e.Message, c.text) {
			return c.category
		}
	}
	return nil
}

// words are what fault messages tell a category by; the first that fits counts.
var words = []struct {
	text     string
	category error
}{
	{"not supported after starting the microVM", errdef.ErrConflict},
	{"not supported before starting the microVM", errdef.ErrConflict},
	{"not allowed after configuring boot-specific resources", errdef.ErrConflict},
	{"save/restore unavailable while running", errdef.ErrConflict},
	{"json body of a request: unknown field", errdef.ErrUnsupported},
	{"Invalid request method and/or path", errdef.ErrUnsupported},
	{"json body of a request", errdef.ErrInvalid},
	{"Machine config error", errdef.ErrInvalid},
	{"larger than the limit", errdef.ErrInvalid},
	{"(os error 28)", errdef.ErrExhausted}, // ENOSPC
}

// clean makes s printable and at most limit bytes long.
func clean(s string, limit int) string {
	s = strings.ToValidUTF8(s[:min(len(s), limit)], "?")
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		switch {
		case unicode.IsPrint(r):
			return r
		case unicode.IsSpace(r):
			return ' '
		default:
			return '?'
		}
	}, s))
}
