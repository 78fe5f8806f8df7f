package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// mailbox is the agent's way to the host in a deterministic machine.
type mailbox struct {
	mem   []byte // guestproto.MailboxSize
	ports ports
	seq   uint64
}

// ports are how the host hears that there is a letter.
type ports interface {
	// knock returns when the letter has been answered.
	knock() error
	// stop stops the machine, and returns when it runs again.
	stop() error
}

// exchange posts a letter and returns the answer, whose body is good until the
// next exchange. In between the machine stands still.
func (m *mailbox) exchange(l guestproto.Letter) (guestproto.Letter, error) {
	m.seq++
	l.Seq = m.seq
	copy(m.mem[guestproto.LetterHead:], l.Body)
	l.PutHead(m.mem)
	if err := m.ports.knock(); err != nil {
		return guestproto.Letter{}, err
	}
	answer, size, err := guestproto.DecodeHead(m.mem)
	if err != nil {
		return guestproto.Letter{}, err
	}
	if answer.Seq != m.seq || answer.Kind.FromAgent() {
		return guestproto.Letter{}, fmt.Errorf("%w: letter %d was not answered", guestproto.ErrProtocol, m.seq)
	}
	answer.Body = m.mem[guestproto.LetterHead:][:size]
	return answer, nil
}

// expect is exchange for a letter that has one kind of answer.
func (m *mailbox) expect(kind guestproto.LetterKind, l guestproto.Letter) (guestproto.Letter, error) {
	answer, err := m.exchange(l)
	if err == nil && answer.Kind != kind {
		err = fmt.Errorf("%w: letter of kind %d was answered by one of kind %d", guestproto.ErrProtocol, l.Kind, answer.Kind)
	}
	return answer, err
}

// send posts what needs no answer, in as many letters as it takes.
func (m *mailbox) send(kind guestproto.LetterKind, stream uint32, data []byte) error {
	for len(data) > 0 {
		n := min(len(data), guestproto.MaxLetter)
		if _, err := m.expect(guestproto.LetterGo, guestproto.Letter{Kind: kind, Stream: stream, Body: data[:n]}); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// want fetches the next bytes of an input, which are good until the next
// exchange, and says whether they are the last.
func (m *mailbox) want(stream uint32) (data []byte, last bool, err error) {
	answer, err := m.expect(guestproto.LetterData, guestproto.Letter{Kind: guestproto.LetterWant, Stream: stream})
	return answer.Body, answer.Last, err
}

// ServeMailbox does one job after another that the host puts into mem, which
// holds guestproto.MailboxSize bytes. knock returns when the host has answered
// what is there. It returns when knock fails, or the host breaks the protocol.
func (a *Agent) ServeMailbox(mem []byte, knock func() error) error {
	return a.serveMailbox(&mailbox{mem: mem, ports: knocker(knock)})
}

// knocker are the ports of what is no machine.
type knocker func() error

func (k knocker) knock() error { return k() }
func (k knocker) stop() error  { return nil }

func (a *Agent) serveMailbox(m *mailbox) error {
	a.tidy()
	next := guestproto.Letter{Kind: guestproto.LetterReady, Body: guestproto.Encode(&guestproto.Welcome{Agent: Version})}
	for {
		answer, err := m.exchange(next)
		switch {
		case err != nil:
		case answer.Kind == guestproto.LetterFreeze:
			err = m.ports.stop()
		case answer.Kind == guestproto.LetterJob:
			var job guestproto.Job
			if err = guestproto.Decode(answer.Body, &job); err == nil {
				next, err = a.doJob(m, &job)
			}
		default:
			err = fmt.Errorf("%w: a letter of kind %d is no job", guestproto.ErrProtocol, answer.Kind)
		}
		if err != nil {
			return err
		}
	}
}

// doJob does a job and returns the letter that tells of it. An error is one of
// the mailbox.
func (a *Agent) doJob(m *mailbox, job *guestproto.Job) (guestproto.Letter, error) {
	r := &run{agent: a, box: m, job: job}
	done, err := r.do()
	if job.Quiesce {
		a.tidy()
	}
	switch {
	case errors.Is(err, errBox):
		return guestproto.Letter{}, err
	case err != nil:
		refused := &guestproto.Reset{Code: errdef.Code(err), Message: err.Error()}
		return guestproto.Letter{Kind: guestproto.LetterRefused, Body: guestproto.Encode(refused)}, nil
	}
	return guestproto.Letter{Kind: guestproto.LetterDone, Body: guestproto.Encode(done)}, nil
}

// tidy makes the machine ready to be frozen.
func (a *Agent) tidy() {
	a.sys.sync()
	debug.FreeOSMemory()
}

// serveDeterministic serves the mailbox of a machine, on a thread that nothing
// the machine's processes do can keep from running when it has something to do.
func (a *Agent) serveDeterministic(b *boot) error {
	mem, err := mapMailbox(b.option(optMailbox, ""))
	if err != nil {
		return err
	}
	// One for this thread, which must not wait for others of the runtime's that
	// have no priority.
	runtime.GOMAXPROCS(2)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err = becomeUrgent(); err != nil {
		return err
	}
	if err = keepPorts(); err != nil {
		return err
	}
	// What the agent makes garbage of is little: it collects it when it is asked
	// to tidy up, and at no other time.
	debug.SetGCPercent(-1)
	return a.serveMailbox(&mailbox{mem: mem, ports: machinePorts{}})
}

// mapMailbox maps the memory at a guest-physical address, which the kernel was
// told to leave alone.
func mapMailbox(address string) ([]byte, error) {
	at, err := strconv.ParseInt(address, 0, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: address of mailbox %q", errdef.ErrInvalid, address)
	}
	f, err := os.OpenFile("/dev/mem", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // the mapping stays
	mem, err := unix.Mmap(int(f.Fd()), at, guestproto.MailboxSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map mailbox at %#x: %w", at, err)
	}
	if len(bytes.Trim(mem[:guestproto.LetterHead], "\x00")) != 0 {
		return nil, fmt.Errorf("%w: the mailbox at %#x is in use", errdef.ErrConflict, at)
	}
	return mem, nil
}

// becomeUrgent lets this thread go before all ordinary ones. Children do not
// inherit it.
func becomeUrgent() error {
	attr := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
	return os.NewSyscallError("sched_setattr", unix.SchedSetAttr(0, attr, 0))
}

// keepPorts keeps the children of this thread, root or not, from ports and
// /dev/mem, with which the machine is stopped and the mailbox written, and from
// putting programs of theirs into the kernel. Who gets around it harms only the
// outcome of its own run: the host trusts nothing that it finds in the mailbox.
func keepPorts() error {
	for _, c := range []uintptr{unix.CAP_SYS_RAWIO, unix.CAP_SYS_MODULE} {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return os.NewSyscallError("prctl PR_CAPBSET_DROP", err)
		}
	}
	return nil
}
