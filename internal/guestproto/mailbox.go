package guestproto

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"
)

// The mailbox is how host and agent speak in a deterministic machine, which has
// no stream between them: a piece of the guest's memory that both can reach,
// and that the host touches only while the machine stands still. The agent puts
// a letter into it and stops the machine; the host puts its answer in the same
// place and lets the machine run. docs/formats/mailbox.md describes it.

// Sizes of the mailbox.
const (
	// MailboxVersion is the version of the mailbox's format.
	MailboxVersion = 1
	// MailboxSize is how much memory the mailbox takes.
	MailboxSize = 1 << 20
	// LetterHead is the size of what stands before a letter's body.
	LetterHead = 64
	// MaxLetter is the largest body of a letter.
	MaxLetter = MailboxSize - LetterHead
)

// The ports of a deterministic machine, for bytes that are written to them.
const (
	// PortStop stops the machine when the byte's lowest bit is set. It is only
	// for LetterFreeze.
	PortStop = 0x505
	// PortPing tells the host that there is a letter.
	PortPing = 0x508
	// PortGate takes a byte when the host has answered, and not before: the
	// processor stands still meanwhile.
	PortGate = 0x509
)

// LetterKind says what a letter is for.
type LetterKind uint16

// The kinds of letter. Those below 64 are the agent's, and the host answers
// LetterReady, LetterDone and LetterRefused with LetterJob, LetterWant with
// LetterData, and the others with LetterGo.
const (
	LetterReady   LetterKind = 1  // it waits for its first job; the body is a Welcome
	LetterWant    LetterKind = 2  // it wants the next bytes of input Stream
	LetterOutput  LetterKind = 3  // Body was written to output Stream
	LetterFile    LetterKind = 4  // Body is the next bytes of file Stream of Job.Collect
	LetterDone    LetterKind = 5  // the job is over, it waits for another; the body is a JobDone
	LetterRefused LetterKind = 6  // the job could not be begun, or its files not be had; a Reset
	LetterJob     LetterKind = 64 // the body is a Job
	LetterData    LetterKind = 65 // Body is what was wanted; Last with the end of it
	LetterGo      LetterKind = 66 // go on
	LetterFreeze  LetterKind = 67 // to one who waits for a job: stop the machine, and ask again when it runs
)

// FromAgent reports whether a letter of this kind is the agent's to send.
func (k LetterKind) FromAgent() bool { return k >= LetterReady && k <= LetterRefused }

// The streams of letters. Inputs are numbered from StreamFiles on as Job.Files
// are, and StreamStdin is the standard input.
const (
	StreamStdin  = 0
	StreamStdout = 1
	StreamStderr = 2
	StreamFiles  = 16
)

// Letter is what lies in the mailbox.
type Letter struct {
	Kind   LetterKind
	Stream uint32
	Seq    uint64 // the agent counts; an answer has the number of its question
	Last   bool
	Body   []byte
}

const (
	letterMagic = "TINEMBOX"
	letterLast  = 1 // flag

	kindAt, streamAt, seqAt, sizeAt, flagsAt, headEnd = 10, 12, 16, 24, 28, 32
)

// PutHead writes what stands before the letter's body to b, which has room for
// LetterHead bytes.
func (l *Letter) PutHead(b []byte) {
	clear(b[:LetterHead])
	copy(b, letterMagic)
	binary.LittleEndian.PutUint16(b[len(letterMagic):], MailboxVersion)
	binary.LittleEndian.PutUint16(b[kindAt:], uint16(l.Kind))
	binary.LittleEndian.PutUint32(b[streamAt:], l.Stream)
	binary.LittleEndian.PutUint64(b[seqAt:], l.Seq)
	binary.LittleEndian.PutUint32(b[sizeAt:], uint32(len(l.Body)))
	if l.Last {
		binary.LittleEndian.PutUint32(b[flagsAt:], letterLast)
	}
}

// DecodeHead reads what stands before a letter's body, and returns how long that
// is, which is at most MaxLetter. Nothing that is not such a letter is taken for
// one.
func DecodeHead(b []byte) (l Letter, size int, err error) {
	switch {
	case len(b) < LetterHead || string(b[:len(letterMagic)]) != letterMagic:
		return Letter{}, 0, fmt.Errorf("%w: there is no letter in the mailbox", ErrProtocol)
	case binary.LittleEndian.Uint16(b[len(letterMagic):]) != MailboxVersion:
		return Letter{}, 0, fmt.Errorf("%w: mailbox version %d", ErrProtocol, binary.LittleEndian.Uint16(b[len(letterMagic):]))
	}
	bodySize, flags := binary.LittleEndian.Uint32(b[sizeAt:]), binary.LittleEndian.Uint32(b[flagsAt:])
	if bodySize > MaxLetter {
		return Letter{}, 0, fmt.Errorf("%w: a letter of %d bytes", ErrProtocol, bodySize)
	}
	if flags&^letterLast != 0 || len(bytes.Trim(b[headEnd:LetterHead], "\x00")) != 0 {
		return Letter{}, 0, fmt.Errorf("%w: a letter with what this version does not know", ErrProtocol)
	}
	return Letter{
		Kind:   LetterKind(binary.LittleEndian.Uint16(b[kindAt:])),
		Stream: binary.LittleEndian.Uint32(b[streamAt:]),
		Seq:    binary.LittleEndian.Uint64(b[seqAt:]),
		Last:   flags == letterLast,
	}, int(bodySize), nil
}

// Welcome is what an agent says first.
type Welcome struct {
	Agent string // its version
}

func (m *Welcome) code(c *coder) { c.string(&m.Agent) }

// Job is a command for the agent of a deterministic machine. Its input and the
// contents of its files are fetched piece by piece.
type Job struct {
	Argv    []string
	Env     []string // NAME=value, beside what every command has
	Dir     string   // "" is the home directory
	Stdin   bool     // there is a standard input
	Files   []JobFile
	Collect []string // files to send back
	// Entropy is all that random numbers are made of from now on, and Clock the
	// wall clock at the command's start, in nanoseconds since 1970. Neither is
	// touched when Entropy is empty.
	Entropy []byte
	Clock   int64
	// Time is how long the command may take by the guest's clock, Output how
	// many bytes it may write, and CollectSize how many the files may have.
	Time        time.Duration
	Output      int64
	CollectSize int64
	// Quiesce has the agent tidy up behind the command, for a machine that will
	// be frozen.
	Quiesce bool
}

func (m *Job) code(c *coder) {
	c.strings(&m.Argv)
	c.strings(&m.Env)
	c.string(&m.Dir)
	c.bool(&m.Stdin)
	messages(c, &m.Files)
	c.strings(&m.Collect)
	c.bytes(&m.Entropy)
	number(c, &m.Clock)
	number(c, &m.Time)
	number(c, &m.Output)
	number(c, &m.CollectSize)
	c.bool(&m.Quiesce)
}

// JobFile is a file that a job brings.
type JobFile struct {
	Path string
	Mode uint32 // permission bits
	Size int64
}

func (m *JobFile) code(c *coder) {
	c.string(&m.Path)
	number(c, &m.Mode)
	number(c, &m.Size)
}

// JobEnd says how a job ended.
type JobEnd int

// The ways in which a job ends.
const (
	JobExited        JobEnd = iota // the command ended, by itself or by a signal
	JobNotFound                    // there is no such command
	JobNotExecutable               // it cannot be executed
	JobTimedOut                    // Job.Time was over
	JobOutputLimit                 // there was more than Job.Output
	JobOutOfMemory                 // the kernel ended it for want of memory
)

// JobDone tells of a job that was begun.
type JobDone struct {
	End     JobEnd
	Code    int           // exit code, or -1
	Signal  int           // the signal that ended it, or 0
	Virtual time.Duration // how long it took by the guest's clock
	Files   []JobCollected
}

func (m *JobDone) code(c *coder) {
	number(c, &m.End)
	number(c, &m.Code)
	number(c, &m.Signal)
	number(c, &m.Virtual)
	messages(c, &m.Files)
}

// JobCollected is a file of Job.Collect that is there, and was sent.
type JobCollected struct {
	Index int // in Job.Collect
	Mode  uint32
	Size  int64
}

func (m *JobCollected) code(c *coder) {
	number(c, &m.Index)
	number(c, &m.Mode)
	number(c, &m.Size)
}
