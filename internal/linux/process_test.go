package linux

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

func TestProcess(t *testing.T) {
	t.Parallel()
	cmd, end := startChild(t, filledFile(t), "")
	pid := cmd.Process.Pid
	start, err := StartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = OpenProcess(pid, start+1); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("another start time: %v", err)
	}
	p, err := OpenProcess(pid, start)
	if err != nil {
		t.Fatal(err)
	}
	if err = p.Signal(0); err != nil {
		t.Errorf("signal 0: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	var wg sync.WaitGroup
	cause := errors.New("enough")
	wg.Go(func() {
		if waitErr := p.Wait(ctx); !errors.Is(waitErr, cause) {
			t.Errorf("cancelled wait: %v", waitErr)
		}
	})
	for range 3 { // several may wait at once
		wg.Go(func() {
			if waitErr := p.Wait(t.Context()); waitErr != nil {
				t.Errorf("wait: %v", waitErr)
			}
		})
	}
	cancel(cause)
	end()
	wg.Wait()
	if _, err = OpenProcess(pid, start); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a zombie was opened: %v", err)
	}
	if err = cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if err = p.Signal(unix.SIGKILL); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("signal to the dead: %v", err)
	}
	if err = p.Wait(t.Context()); err != nil {
		t.Errorf("wait for the dead: %v", err)
	}
	if err = p.Close(); err != nil {
		t.Error(err)
	}
	if _, err = StartTime(pid); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("start time of the dead: %v", err)
	}
	if _, err = MemoryUse(pid); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("memory of the dead: %v", err)
	}
}

// A process that is nobody's child here can be waited for too.
func TestWaitForStranger(t *testing.T) {
	t.Parallel()
	start, err := StartTime(os.Getppid())
	if err != nil {
		t.Skipf("no parent to look at: %v", err)
	}
	p, err := OpenProcess(os.Getppid(), start)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err = p.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	tail := strings.Repeat(" 1", 18) + " 4242 7"
	tests := map[string]struct {
		line string
		want stat
		bad  bool
	}{
		"plain":       {"12 (sh) S" + tail, stat{'S', 4242}, false},
		"odd-name":    {"12 (a) Z (b c)) R" + tail, stat{'R', 4242}, false},
		"newline":     {"12 (a\nb) Z" + tail + "\n", stat{'Z', 4242}, false},
		"empty":       {"", stat{}, true},
		"short":       {"12 (sh) S 1 2", stat{}, true},
		"not-a-start": {"12 (sh) S" + strings.Repeat(" x", 30), stat{}, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parseStat([]byte(tt.line))
			if got != tt.want || (err != nil) != tt.bad {
				t.Errorf("got %v, %v; want %v", got, err, tt.want)
			}
		})
	}
}

func TestFindProcesses(t *testing.T) {
	t.Parallel()
	cmd, _ := startChild(t, filledFile(t), "1 2 3")
	want := []string{"a child (of) tine", "1 2 3"}
	got, err := FindProcesses(func(_ int, argv []string) bool { return slices.Equal(argv[1:], want) })
	// A process that it has just forked, as Go does once to see what the kernel
	// can, has the same arguments until it is gone.
	if err != nil || !slices.Contains(got, cmd.Process.Pid) {
		t.Errorf("got %v, %v; want %d among them", got, err, cmd.Process.Pid)
	}
	none, err := FindProcesses(func(_ int, argv []string) bool { return slices.Equal(argv[1:], append(want, "4")) })
	if err != nil || len(none) > 0 {
		t.Errorf("got %v, %v; want none", none, err)
	}
}

func TestBootID(t *testing.T) {
	t.Parallel()
	id, err := BootID()
	if err != nil || len(id) != 36 {
		t.Errorf("got %q, %v", id, err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (a) Z (b c)) R" + strings.Repeat(" 1", 30)))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if st, err := parseStat(data); err != nil && st != (stat{}) {
			t.Errorf("an error, and %v", st)
		}
	})
}
