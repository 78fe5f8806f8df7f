package deterministic

import (
	"context"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/vmm"
)

// machine is what a conversation needs of one.
type machine interface {
	Halted(ctx context.Context) error
	Answer() error
}

// talk is the conversation with the agent of a machine. The machine stands
// still whenever it is the host's turn, and what the guest has put into the
// mailbox is in last.
type talk struct {
	vm   machine
	box  vmm.Mailbox
	last guestproto.Letter
}

// hear reads the letter in the mailbox of a machine that stands still.
func (t *talk) hear() error {
	var head [guestproto.LetterHead]byte
	if _, err := t.box.ReadAt(head[:], 0); err != nil {
		return err
	}
	l, size, err := guestproto.DecodeHead(head[:])
	if err != nil {
		return fmt.Errorf("the guest has written to the mailbox what is no letter: %w", err)
	}
	if !l.Kind.FromAgent() {
		return fmt.Errorf("%w: the guest has stopped the machine without a letter of its own, one of kind %d is there", guestproto.ErrProtocol, l.Kind)
	}
	l.Body = make([]byte, size)
	if _, err = t.box.ReadAt(l.Body, guestproto.LetterHead); err != nil {
		return err
	}
	t.last = l
	return nil
}

// say answers the last letter and waits for the next.
func (t *talk) say(ctx context.Context, l guestproto.Letter) error {
	if err := t.put(l); err != nil {
		return err
	}
	if err := t.vm.Answer(); err != nil {
		return err
	}
	return t.listen(ctx)
}

// listen waits for a letter.
func (t *talk) listen(ctx context.Context) error {
	if err := t.vm.Halted(ctx); err != nil {
		return err
	}
	return t.hear()
}

// put leaves an answer in the mailbox.
func (t *talk) put(l guestproto.Letter) error {
	l.Seq = t.last.Seq
	if len(l.Body) > guestproto.MaxLetter {
		return fmt.Errorf("%w: a letter of %d bytes, %d are possible", errdef.ErrInvalid, len(l.Body), guestproto.MaxLetter)
	}
	head := make([]byte, guestproto.LetterHead, guestproto.LetterHead+len(l.Body))
	l.PutHead(head)
	_, err := t.box.WriteAt(append(head, l.Body...), 0)
	return err
}

// job is a job with all that goes in, and what has come out so far.
type job struct {
	spec  guestproto.Job
	stdin []byte
	files [][]byte // their contents
	take  func(stream uint32, data []byte) error

	sent   map[uint32]int // how much of each input has gone in
	got    int64          // output so far
	back   [][]byte       // the files that were asked for
	backIn int64
}

// run gives the job to the agent, which waits for one, and sees it through.
func (t *talk) run(ctx context.Context, j *job) (*guestproto.JobDone, error) {
	if k := t.last.Kind; k != guestproto.LetterReady && k != guestproto.LetterDone && k != guestproto.LetterRefused {
		return nil, fmt.Errorf("%w: the guest does not wait for a job, it has sent a letter of kind %d", guestproto.ErrProtocol, k)
	}
	j.sent, j.back = map[uint32]int{}, make([][]byte, len(j.spec.Collect))
	answer := guestproto.Letter{Kind: guestproto.LetterJob, Body: guestproto.Encode(&j.spec)}
	for {
		if err := t.say(ctx, answer); err != nil {
			return nil, err
		}
		var err error
		switch t.last.Kind {
		case guestproto.LetterWant:
			answer, err = j.give(t.last.Stream)
		case guestproto.LetterOutput:
			answer, err = guestproto.Letter{Kind: guestproto.LetterGo}, j.output(&t.last)
		case guestproto.LetterFile:
			answer, err = guestproto.Letter{Kind: guestproto.LetterGo}, j.file(&t.last)
		case guestproto.LetterDone:
			return j.done(t.last.Body)
		case guestproto.LetterRefused:
			return nil, refused(t.last.Body)
		default:
			err = fmt.Errorf("%w: a letter of kind %d within a job", guestproto.ErrProtocol, t.last.Kind)
		}
		if err != nil {
			return nil, err
		}
	}
}

// give answers a wish for the next bytes of an input.
func (j *job) give(stream uint32) (guestproto.Letter, error) {
	var all []byte
	switch i := int64(stream) - guestproto.StreamFiles; {
	case stream == guestproto.StreamStdin:
		all = j.stdin
	case i >= 0 && i < int64(len(j.files)):
		all = j.files[i]
	default:
		return guestproto.Letter{}, fmt.Errorf("%w: the guest wants input %d", guestproto.ErrProtocol, stream)
	}
	rest := all[j.sent[stream]:]
	n := min(len(rest), guestproto.MaxLetter)
	j.sent[stream] += n
	return guestproto.Letter{Kind: guestproto.LetterData, Stream: stream, Last: n == len(rest), Body: rest[:n]}, nil
}

// output takes what the command has written.
func (j *job) output(l *guestproto.Letter) error {
	if l.Stream != guestproto.StreamStdout && l.Stream != guestproto.StreamStderr {
		return fmt.Errorf("%w: the guest writes to output %d", guestproto.ErrProtocol, l.Stream)
	}
	if j.got += int64(len(l.Body)); j.got > j.spec.Output {
		return fmt.Errorf("%w: the guest sends more than the %d bytes of output that are allowed", guestproto.ErrProtocol, j.spec.Output)
	}
	return j.take(l.Stream, l.Body)
}

// file takes the next bytes of a file that was asked for.
func (j *job) file(l *guestproto.Letter) error {
	if int64(l.Stream) >= int64(len(j.back)) {
		return fmt.Errorf("%w: the guest sends file %d of %d", guestproto.ErrProtocol, l.Stream, len(j.back))
	}
	if j.backIn += int64(len(l.Body)); j.backIn > j.spec.CollectSize {
		return fmt.Errorf("%w: the guest sends files of more than %d bytes", guestproto.ErrProtocol, j.spec.CollectSize)
	}
	j.back[l.Stream] = append(j.back[l.Stream], l.Body...)
	return nil
}

// done reads how the job ended, and sees that it fits what has come.
func (j *job) done(body []byte) (*guestproto.JobDone, error) {
	var d guestproto.JobDone
	if err := guestproto.Decode(body, &d); err != nil {
		return nil, err
	}
	const maxCode, maxSignal, maxMode = 255, 64, 0o777
	if d.End < guestproto.JobExited || d.End > guestproto.JobOutOfMemory || d.Code < -1 || d.Code > maxCode ||
		d.Signal < 0 || d.Signal > maxSignal || d.Virtual < 0 {
		return nil, fmt.Errorf("%w: the guest tells of a job that ended in no possible way", guestproto.ErrProtocol)
	}
	next := 0
	for _, f := range d.Files {
		if f.Index < next || f.Index >= len(j.back) || f.Size != int64(len(j.back[f.Index])) || f.Mode > maxMode {
			return nil, fmt.Errorf("%w: the guest tells of files that it has not sent", guestproto.ErrProtocol)
		}
		next = f.Index + 1
	}
	return &d, nil
}

// maxReason bounds what is repeated of a guest's own words.
const maxReason = 1 << 10

// refused is why the agent did not do a job.
func refused(body []byte) error {
	var reason guestproto.Reset
	if err := guestproto.Decode(body, &reason); err != nil {
		return err
	}
	text := reason.Message
	if len(text) > maxReason {
		text = text[:maxReason]
	}
	return errdef.Remote(reason.Code, fmt.Sprintf("the guest refused the command: %q", text))
}

// failures are the words of record.Output.Failure.
func failure(end guestproto.JobEnd) string {
	switch end {
	case guestproto.JobNotFound:
		return record.NotFound
	case guestproto.JobNotExecutable:
		return record.NotExecutable
	case guestproto.JobTimedOut:
		return record.TimedOut
	case guestproto.JobOutputLimit:
		return record.OutputLimit
	case guestproto.JobOutOfMemory:
		return record.OutOfMemory
	default:
		return ""
	}
}

// collected are the files of an outcome.
func (j *job) collected(d *guestproto.JobDone) []record.File {
	var files []record.File
	for _, f := range d.Files {
		data := append([]byte{}, j.back[f.Index]...) // not nil
		files = append(files, record.File{Path: j.spec.Collect[f.Index], Mode: f.Mode, Data: data})
	}
	return files
}
