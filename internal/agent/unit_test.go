package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

func TestRing(t *testing.T) {
	t.Parallel()
	var r ring
	total := int64(0)
	for i := range 200_000 {
		ch := guestproto.ChanStdout + guestproto.Channel(i%2)
		r.add(ch, []byte("ab"))
		total += 2
	}
	kept := int64(0)
	for _, p := range r.pieces {
		kept += int64(len(p.Data))
	}
	if kept+r.dropped != total || kept > ringSize || kept != int64(r.size) {
		t.Errorf("kept %d, dropped %d of %d", kept, r.dropped, total)
	}
	if len(r.pieces) > ringSize/64 {
		t.Errorf("%d pieces", len(r.pieces))
	}
}

func TestMergeEnv(t *testing.T) {
	t.Parallel()
	got := mergeEnv([]string{"PATH=/bin", "HOME=/root"}, []string{"HOME=/home/x", "A=1", "PATHX=2"})
	if diff := cmp.Diff([]string{"PATH=/bin", "HOME=/home/x", "A=1", "PATHX=2"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestShorten(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 3000)
	if got := shorten([]string{long, long, long}); len(strings.Join(got, "")) > maxArgvShown+3 {
		t.Errorf("%d bytes are shown", len(strings.Join(got, "")))
	}
}

// refusing is a machine on which no process can be started.
type refusing struct {
	*Fake
	err error
}

func (r refusing) spawn(string, []string, *syscall.ProcAttr) (int, error) { return 0, r.err }

func TestSpawnRefused(t *testing.T) {
	t.Parallel()
	a := New(Config{Fake: NewFake(t.TempDir())})
	defer a.Close()
	a.procs.reaper.sys = refusing{a.procs.reaper.sys.(*Fake), syscall.EAGAIN}
	_, err := a.run(&guestproto.ExecRequest{Argv: []string{"/bin/true"}})
	if !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("error is %v", err)
	}
	if a.procs.running != 0 {
		t.Errorf("%d processes are counted", a.procs.running)
	}
}

func TestProcessLimit(t *testing.T) {
	t.Parallel()
	a := New(Config{Fake: NewFake(t.TempDir())})
	defer a.Close()
	a.procs.running = maxProcesses
	if _, err := a.run(&guestproto.ExecRequest{Argv: []string{"/bin/true"}}); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("error is %v", err)
	}
	a.procs.running = 0
}

func TestFinishedProcessesAreBounded(t *testing.T) {
	t.Parallel()
	a := New(Config{Fake: NewFake(t.TempDir())})
	defer a.Close()
	for range maxFinished + 20 {
		pr, err := a.run(&guestproto.ExecRequest{Argv: []string{"/bin/true"}})
		if err != nil {
			t.Fatal(err)
		}
		<-pr.done
	}
	if n := len(a.procs.list()); n > maxFinished {
		t.Errorf("%d processes are kept", n)
	}
}

func TestFindPort(t *testing.T) {
	t.Parallel()
	class := t.TempDir()
	for port, name := range map[string]string{"null": "other", "zero": portName} {
		if err := os.MkdirAll(filepath.Join(class, port), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(class, port, "name"), []byte(name+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// The device's name is that of the sysfs directory; /dev/zero exists.
	if got := findPort(class); got != "/dev/zero" {
		t.Errorf("port is %q", got)
	}
	if got := findPort(t.TempDir()); got != "" {
		t.Errorf("port is %q", got)
	}
}

// TestPortWithoutAHost: a terminal whose other end is closed takes some bytes,
// then none, and says that it hung up, as a port without a host does.
func TestPortWithoutAHost(t *testing.T) {
	t.Parallel()
	ends, err := openTerminal(0, 0)
	if err != nil {
		t.Skipf("needs a terminal: %v", err)
	}
	defer ends.tty.Close()
	raw, err := ends.tty.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Raw, so that it drops nothing.
	if err = unix.IoctlSetTermios(int(ends.child[0].Fd()), unix.TCSETS, &unix.Termios{Cflag: unix.CS8 | unix.CREAD}); err != nil {
		t.Fatal(err)
	}
	p := &port{File: ends.tty, raw: raw}
	start := time.Now()
	if n, werr := p.Write([]byte("x")); n != 1 || werr != nil {
		t.Fatalf("with a host: %d, %v", n, werr)
	}
	closeAll(ends.child)
	const much = 1 << 20
	for range 2 {
		n, werr := p.Write(make([]byte, much))
		if !errors.Is(werr, errHostGone) || n >= much {
			t.Errorf("without a host: %d, %v", n, werr)
		}
	}
	if took := time.Since(start); took < goneGrace || took > 20*goneGrace {
		t.Errorf("it took %s", took)
	}
}

// TestPortWaitsForAHostThatReads: one that is there may be slow.
func TestPortWaitsForAHostThatReads(t *testing.T) {
	t.Parallel()
	r, w, err := pipe(writeEnd)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll([]*os.File{r, w})
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const much = 1 << 20
	got := make(chan int)
	go func() {
		time.Sleep(goneGrace + 50*time.Millisecond)
		n, _ := io.ReadFull(r, make([]byte, much))
		got <- n
	}()
	if n, err := (&port{File: w, raw: raw}).Write(make([]byte, much)); n != much || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if n := <-got; n != much {
		t.Errorf("%d bytes came", n)
	}
}

func TestCatches(t *testing.T) {
	t.Parallel()
	for status, want := range map[string]bool{
		"": false,
		"Name:\tx\nSigCgt:\t0000000000000800\nCap:\t1\n": true,
		"Name:\tx\nSigCgt:\t00000001fffff7ff\n":          false,
		"Name:\tSigCgt:\t0000000000000800\n":             false,
		"\nSigCgt:\t8":                                   false,
		"\nSigCgt:\tzz\n":                                false,
	} {
		if catches([]byte(status), forkSignal) != want {
			t.Errorf("%q: not %t", status, want)
		}
	}
}

func TestBootOptions(t *testing.T) {
	t.Parallel()
	b := boot{cmdline: strings.Fields("quiet tine.link=vsock tine.pids=99 tine.reserve=x tine.upper=")}
	if b.option(optLink, "") != "vsock" || b.option(optUpper, "75%") != "75%" || b.number(optPIDs, 1) != 99 || b.number(optReserve, 24) != 24 {
		t.Error("options are read wrong")
	}
}

func TestBootFeatures(t *testing.T) {
	t.Parallel()
	for cmdline, want := range map[string]string{
		"quiet":                           "",
		"tine.link=virtio-serial":         "",
		"tine.root=/dev/pmem0":            "",
		"tine.root=/dev/vda":              "blk",
		"tine.disk=/dev/vda tine.net=x":   "blk ext4 net",
		"tine.mode=deterministic":         "e820",
		"tine.link=vsock":                 "mmio rng vsock",
		"tine.root=/dev/vda tine.net=x":   "blk net",
		"tine.link=vsock tine.disk=/dev/": "mmio rng vsock blk ext4",
		"tine.link=vsock tine.root=/dev/vda tine.disk=/dev/vdb tine.net=x": "mmio rng vsock blk ext4 net",
	} {
		b := boot{cmdline: strings.Fields(cmdline)}
		if got := strings.Join(b.features(), " "); got != want {
			t.Errorf("%s: %q, want %q", cmdline, got, want)
		}
	}
}

func TestPlain(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]bool{"": false, "a": true, "A-9_.z": true, "a b": false, "a/b": false, "é": false, "a\n": false, "{": false, "@": false, "[": false, "`": false} {
		if plain(s, 10) != want {
			t.Errorf("plain(%q) is not %t", s, want)
		}
	}
}

func TestPanicBecomesAnError(t *testing.T) {
	t.Parallel()
	a := New(Config{Fake: NewFake(t.TempDir())})
	defer a.Close()
	out := &recorder{}
	session := guestproto.NewAgent(out, func(st *guestproto.Stream, _ []byte) { a.handle(st, nil, nil) })
	if err := session.Deliver(guestproto.Frame{Type: guestproto.TypeOpen, Stream: 1, Payload: []byte{3, 1}}); err != nil {
		t.Fatal(err)
	}
	if out.kind != guestproto.TypeReset {
		t.Errorf("a frame of type %d was sent", out.kind)
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add("nobody")
	f.Add("0:0")
	f.Add("12345:root")
	f.Add(":")
	f.Fuzz(func(t *testing.T, spec string) {
		a := &Agent{home: "/"}
		if who, err := a.account(spec); err == nil && who.home == "" && who.name == "" {
			t.Errorf("account %q is %+v", spec, who)
		}
	})
}

// recorder remembers the last frame's type.
type recorder struct{ kind guestproto.FrameType }

func (r *recorder) WriteFrame(_ context.Context, t guestproto.FrameType, _ uint32, _ ...[]byte) error {
	r.kind = t
	return nil
}

// reaping is a machine whose children end before spawn returns.
type reaping struct {
	*Fake
	reaper *reaper
}

func (r *reaping) reapsAll() bool { return true }

func (r *reaping) spawn(string, []string, *syscall.ProcAttr) (int, error) {
	r.reaper.ended(7, 3<<8)
	r.reaper.ended(8, 0) // an orphan
	return 7, nil
}

func TestChildThatEndsAtOnce(t *testing.T) {
	t.Parallel()
	sys := &reaping{}
	r := &reaper{sys: sys, children: map[int]*child{}}
	sys.reaper = r
	c, err := r.start("/bin/false", nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	<-c.exited
	if c.status.ExitStatus() != 3 || len(r.children) != 0 || len(r.early) != 0 {
		t.Errorf("%+v, %+v", c, r)
	}
	r.ended(9, 0)
	if len(r.early) != 0 {
		t.Error("an orphan is remembered for ever")
	}
}
