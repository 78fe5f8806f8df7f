package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/api/apitest"
)

// openPTY returns the two ends of a terminal of 91 columns and 17 rows.
func openPTY(t *testing.T) (near, far *os.File) {
	t.Helper()
	near, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	fd := int(near.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0),
		unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: 91, Row: 17}))
	if err != nil {
		t.Fatal(err)
	}
	far, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	return near, far
}

// TestTerminal runs a command on a terminal, which is as it was afterwards.
func TestTerminal(t *testing.T) {
	t.Parallel()
	near, far := openPTY(t)
	before, err := term.GetState(int(far.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	url := apitest.New(t).Serve("../../api/openapi.yaml").URL
	if _, err = near.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	code := Run(t.Context(), Environment{
		Args:  []string{"run", "--snapshot", "py", "-it", "--", "sh", "-c", "stty size; echo $TERM; read x; echo got $x; exit 3"},
		Stdin: far, Stdout: &stdout, Stderr: &stderr,
		Getenv: func(name string) string { return map[string]string{"TINE_URL": url, "TERM": "vt52"}[name] },
	})
	for _, want := range []string{"17 91\r\n", "vt52\r\n", "got typed\r\n"} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("stdout %q lacks %q", stdout.String(), want)
		}
	}
	if code != 3 || stderr.Len() != 0 {
		t.Errorf("exit code %d, stderr %q", code, stderr.String())
	}
	after, err := term.GetState(int(far.Fd()))
	if err != nil || *after != *before {
		t.Errorf("the terminal was left in another state: %v", err)
	}
}

// TestInterruptible sees that a read that waits can be ended.
func TestInterruptible(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(); _ = w.Close() })
	in, interrupt := interruptible(r)
	if _, err = w.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	var got []byte
	var work sync.WaitGroup
	work.Go(func() { got, err = io.ReadAll(in) })
	interrupt()
	work.Wait()
	if err != nil || len(got) > 1 {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestNews shows the same news in each of its forms.
func TestNews(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		show func(*news, client.Progress)
		want string
	}{
		{"lines", (*news).line, "root: unpacking\nroot: packing\n"},
		{"terminal", (*news).update, "\r\x1b[Kroot: unpacking 10%\r\x1b[Kroot: unpacking 20%\r\x1b[Kroot: packing\r\x1b[K"},
		{"json", (*news).object, `{"progress":{"done":1,"message":"unpacking","step":"root","total":10}}
{"progress":{"done":2,"message":"unpacking","step":"root","total":10}}
{"progress":{"message":"packing","step":"root"}}
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			n := &news{w: &out, show: tt.show}
			n.report(client.Progress{Step: "root", Message: "unpacking", Done: 1, Total: 10})
			n.report(client.Progress{Step: "root", Message: "unpacking", Done: 2, Total: 10})
			n.report(client.Progress{Step: "root", Message: "packing"})
			n.close()
			if out.String() != tt.want {
				t.Errorf("got %q\nwant %q", out.String(), tt.want)
			}
		})
	}
}

func TestStateDir(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		a := &app{Environment: Environment{Getenv: func(name string) string { return map[string]string{"HOME": "/home/u"}[name] }}}
		if got := a.stateDir(); got != "/home/u/.local/state/tine" {
			t.Errorf("state directory is %s", got)
		}
	}
	a := &app{Environment: Environment{Getenv: func(name string) string { return map[string]string{"TINE_STATE_DIR": "/s"}[name] }}}
	if got := a.stateDir(); got != "/s" {
		t.Errorf("state directory is %s", got)
	}
	if a.flags.stateDir = "/f"; a.stateDir() != "/f" {
		t.Errorf("state directory is %s", a.stateDir())
	}
}

func TestAbsolute(t *testing.T) {
	t.Parallel()
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"debian:bookworm+a": "debian:bookworm+a", "docker:x/y:1": "docker:x/y:1", "dir:x": "dir:" + wd + "/x", "oci:/x": "oci:/x",
		"./x": wd + "/x", "/x": "/x", "x": "x", "docker-archive:a.tar": "docker-archive:" + wd + "/a.tar",
	} {
		if got := absolute(in); got != want {
			t.Errorf("absolute(%q) = %q, want %q", in, got, want)
		}
	}
}
