// Package relink is a byte stream between two ends that outlives the connections
// that carry it.
//
// One end, the host, opens streams and dials connections; the other, the guest,
// accepts them. Bytes are numbered, and what the other end has not read yet is
// kept, at most a window of it, and sent again on the connection that takes the
// place of a broken one: both ends read what was written, in order and once, or
// an error. A stream ends when it is closed, when it has been without a
// connection for its grace, when a newer one takes its place, or when the other
// end breaks the protocol.
//
// It opens no sockets: whoever uses it hands it connections. A connection is
// anything whose Close ends its reads and writes. Neither end trusts the other.
// The wire is described in docs/formats/relink.md.
package relink

import (
	"errors"
	"fmt"
	"time"
)

// Version is the protocol's version. A guest that is frozen in a snapshot keeps
// the one that it has.
const Version = 1

// The protocol's bounds.
const (
	// Window is how many bytes an end may have sent, or be about to send, that
	// the other has not read.
	Window = 256 << 10
	// MaxData is the most that one frame carries.
	MaxData = 32 << 10
	// IDSize is the length of a stream's id.
	IDSize = 16
)

// Grace is how long a host's stream may be without a connection, and what a
// guest's usually is given.
const Grace = 10 * time.Second

// ackEvery is how many bytes an end reads before it says so.
const ackEvery = Window / 4

// The ways in which a stream ends badly.
var (
	// ErrProtocol: the other end sent what the protocol forbids.
	ErrProtocol = errors.New("protocol violation")
	// ErrGone is for dial functions: there is nothing to dial any more, so the
	// stream ends without waiting for its grace.
	ErrGone = errors.New("other end is gone")
	// ErrNoConnection: the stream was without a connection for its grace.
	ErrNoConnection = errors.New("no connection")
	// ErrUnknown: the guest does not know the stream, or no longer.
	ErrUnknown = errors.New("guest does not know the stream")
)

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}
