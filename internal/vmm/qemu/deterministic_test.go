package qemu

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestGate: what a guest writes goes through once for each answer, whatever
// became of the flags of QEMU's copy.
func TestGate(t *testing.T) {
	t.Parallel()
	g, err := newGate()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.close)
	write := func() error {
		_, writeErr := control(g.passIn, func(fd int) (int, error) { return unix.Write(fd, []byte{1}) })
		return writeErr
	}
	// As QEMU does when it opens a file that it was handed.
	if _, err = control(g.passIn, func(fd int) (int, error) {
		return unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_APPEND|unix.O_NONBLOCK)
	}); err != nil {
		t.Fatal(err)
	}
	if err = g.handed(); err != nil {
		t.Fatal(err)
	}
	m := &machine{gate: g}
	for range 5 {
		for range 3 {
			if err = write(); !errors.Is(err, unix.EAGAIN) {
				t.Fatalf("written without an answer: %v", err)
			}
		}
		if err = m.Answer(); err != nil {
			t.Fatal(err)
		}
		if err = write(); err != nil {
			t.Fatalf("not written with an answer: %v", err)
		}
	}
}

func TestForgetHostClocks(t *testing.T) {
	t.Parallel()
	section := "\x04\x00\x00\x00\x00\x05timer\x00\x00\x00\x00\x00\x00\x00\x02"
	clocks := "12345678abcdefgh87654321"
	for name, tt := range map[string]struct{ in, want string }{
		"its section":   {"before" + section + clocks + "after", "before" + section + string(make([]byte, 24)) + "after"},
		"none":          {"before" + clocks, "before" + clocks},
		"cut off":       {"before" + section + "1234", "before" + section + "1234"},
		"more than one": {section + clocks + section + clocks, section + clocks + section + clocks},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "device")
			if err := os.WriteFile(path, []byte(tt.in), 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err = errors.Join(forgetHostClocks(f), f.Close()); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, []byte(tt.want)) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}
