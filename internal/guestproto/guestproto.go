// Package guestproto is the language that a host and the agent in its guest
// speak over one byte stream: frames that either side can find again after any
// garbage, sessions that a new host can start at any time, streams with flow
// control, and the messages of every verb.
//
// It opens no sockets and starts no goroutines. Whoever owns the byte stream
// reads frames with a Reader, hands them to a Session, and gives the Session a
// FrameWriter. Encoding is by hand and without reflection, because a freshly
// forked guest under software emulation pays for every instruction it runs for
// the first time. The wire is described in docs/formats/guestproto.md.
package guestproto

import (
	"errors"
	"fmt"
)

// Version is the protocol's version, said in Hello and HelloAck. Fields are
// only ever added at the end of messages, so it changes only when an old agent
// in an old snapshot could no longer be understood.
const Version = 1

// The protocol's bounds.
const (
	// MaxPayload is the longest payload of one frame.
	MaxPayload = 32 << 10
	// MaxData is the most that Send puts in one Data frame: with header and
	// stuffing it still fits the 32 KiB that Linux's virtio console moves in
	// one write.
	MaxData = 31 << 10
	// Window is what each side may send on a stream before it has credit.
	Window = 256 << 10
	// FrameCost is what a Data frame costs of the window beside its bytes, so
	// that a flood of tiny frames is bounded too.
	FrameCost = 32
	// MaxStreams is how many streams a session may have open at once.
	MaxStreams = 256
	// MaxRequest bounds a request that is longer than one frame.
	MaxRequest = 5 << 20
	// MaxResetMessage bounds the message of a Reset; a longer one is cut.
	MaxResetMessage = 4 << 10
	// NonceSize is the length of the nonce in Hello.
	NonceSize = 16
	// MaxSecrets is how many secrets a guest may hold.
	MaxSecrets = 64
	// MaxSecret bounds the value of one secret, and MaxSecretsSize all of them.
	MaxSecret      = 64 << 10
	MaxSecretsSize = 256 << 10
	// MaxChanges is how many entries VerbChanges tells at most.
	MaxChanges = 100_000
	// MaxDials is how many connections to its ports a guest has at once.
	MaxDials = 128
	// MaxPort is the highest port that there is.
	MaxPort = 1<<16 - 1
	// MaxChangePath bounds the path and the target in a Change.
	MaxChangePath = 4 << 10
)

// FrameType says what a frame is.
type FrameType uint8

// The frame types.
const (
	// TypeHello starts a session: a Hello message. Host to agent.
	TypeHello FrameType = 1
	// TypeHelloAck confirms it: a HelloAck message. Agent to host.
	TypeHelloAck FrameType = 2
	// TypeOpen opens a stream: verb, flags, request. Host to agent.
	TypeOpen FrameType = 3
	// TypeData carries a channel number and bytes.
	TypeData FrameType = 4
	// TypeEnd says that no more comes from this side, with an optional last
	// channel number and bytes. From the agent it ends the whole stream.
	TypeEnd FrameType = 5
	// TypeCredit lets the other side send more: a uvarint of bytes.
	TypeCredit FrameType = 6
	// TypeReset ends the stream at once: a Reset message.
	TypeReset FrameType = 7
)

// Verb says what a stream asks the agent to do.
type Verb uint8

// The verbs.
const (
	VerbPing      Verb = 1
	VerbIdentity  Verb = 2
	VerbExec      Verb = 3
	VerbAttach    Verb = 4
	VerbProcesses Verb = 5
	VerbSignal    Verb = 6
	VerbResize    Verb = 7
	VerbEval      Verb = 8
	VerbWarm      Verb = 9
	VerbRead      Verb = 10
	VerbWrite     Verb = 11
	VerbStat      Verb = 12
	VerbList      Verb = 13
	VerbMkdir     Verb = 14
	VerbMove      Verb = 15
	VerbRemove    Verb = 16
	VerbWatch     Verb = 17
	VerbQuiesce   Verb = 18
	VerbResume    Verb = 19
	VerbPowerOff  Verb = 20
	VerbChanges   Verb = 21
	VerbDial      Verb = 22
)

// Channel tells apart the kinds of bytes within one stream.
type Channel uint8

// The channels. On ChanMessage each Data frame is one message; on the others
// frame boundaries mean nothing.
const (
	ChanMessage Channel = 0
	// ChanStdin carries input to the guest: a process's stdin, a file's bytes,
	// what a connection to one of its ports is sent.
	ChanStdin Channel = 1
	// ChanStdout carries output: stdout, a terminal, a file's bytes, what a
	// connection to a port answers. There an empty frame ends it: an End would
	// end the other direction too.
	ChanStdout Channel = 2
	// ChanStderr carries a process's stderr.
	ChanStderr Channel = 3
	// ChanReply carries an interpreter's reply line.
	ChanReply Channel = 4
	// ChanRequest carries the rest of a request that did not fit in Open; an
	// empty frame ends it.
	ChanRequest Channel = 5
)

// Flags of an Open frame.
const (
	// FlagEnd: the host sends nothing more on this stream.
	FlagEnd = 1 << 0
	// FlagMore: the request goes on in ChanRequest.
	FlagMore = 1 << 1
)

// Codes that a Reset carries beside the words of package errdef.
const (
	// CodeCanceled: whoever wanted the answer does not want it any more.
	CodeCanceled = "canceled"
	// CodeDetached: the host leaves a process running, for a later attach.
	CodeDetached = "detached"
)

// The ways in which a session ends badly.
var (
	// ErrProtocol: the peer sent what the protocol forbids.
	ErrProtocol = errors.New("protocol violation")
	// ErrBadFrame: a frame was cut off, too long or malformed. The Reader has
	// found the next delimiter and can go on.
	ErrBadFrame = fmt.Errorf("%w: bad frame", ErrProtocol)
	// ErrTooManyStreams: MaxStreams are open already.
	ErrTooManyStreams = errors.New("too many streams")
	// ErrStreamOver: the stream has ended; nothing more can be sent on it.
	ErrStreamOver = errors.New("stream is over")
	// ErrSessionOver: a newer session, or the end of the link, ended this one.
	ErrSessionOver = errors.New("session is over")
)

// ResetError is the error of a stream that the peer reset.
type ResetError struct {
	Code    string
	Message string
}

// Error returns the peer's message.
func (e *ResetError) Error() string { return e.Message }
