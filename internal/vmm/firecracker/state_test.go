package firecracker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc64"
	"os"
	"path/filepath"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

// sum is the checksum that Firecracker puts behind device state.
func sum(data []byte) uint64 { return ^crc64.Update(^uint64(0), crc64.MakeTable(jones), data) }

// TestChecksum: it is the one that others have, by the value that all CRCs are
// told by (Redis's src/crc64.c).
func TestChecksum(t *testing.T) {
	t.Parallel()
	if got := sum([]byte("123456789")); got != 0xe9c6d914c4b8d9ca {
		t.Errorf("checksum %#x", got)
	}
}

func TestVerifyState(t *testing.T) {
	t.Parallel()
	good := bytes.Repeat([]byte("state"), 1000)
	good = binary.LittleEndian.AppendUint64(good, sum(good))
	flipped := bytes.Clone(good)
	flipped[17] ^= 1
	for name, tt := range map[string]struct {
		data []byte
		ok   bool
	}{
		"good":    {good, true},
		"empty":   {nil, false},
		"short":   {binary.LittleEndian.AppendUint64([]byte("x"), sum([]byte("x"))), false},
		"flipped": {flipped, false},
		"cut off": {good[:len(good)-1], false},
		"longer":  {append(bytes.Clone(good), 1), false},
		"zeros":   {make([]byte, 4096), true}, // as Firecracker's own check has it; that finds no header then
	} {
		if err := verifyState(tt.data); (err == nil) != tt.ok || err != nil && !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkState(path); err != nil {
		t.Error(err)
	}
	if err := os.Truncate(path, maxState+1); err != nil {
		t.Fatal(err)
	}
	if err := checkState(path); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("too long: %v", err)
	}
}

// TestConsole: it keeps the beginning of what is written, and takes no more.
func TestConsole(t *testing.T) {
	t.Parallel()
	c, err := newConsole()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.close() }()
	if _, err = c.file.WriteString("booting\nKernel panic\n\n"); err != nil {
		t.Fatal(err)
	}
	if got := c.lastLine(); got != "Kernel panic" {
		t.Errorf("last line %q", got)
	}
	if _, err = c.file.Write(make([]byte, consoleSize)); !errors.Is(err, os.ErrPermission) {
		t.Errorf("writing on: %v", err)
	}
	if text, textErr := c.text(); textErr != nil || text != "booting\nKernel panic\n\n" {
		t.Errorf("text %q, %v", text, textErr)
	}
	if err = c.file.Truncate(1); err == nil {
		t.Error("it was cut off")
	}
	var none *console
	if text, textErr := none.text(); text != "" || textErr != nil || none.close() != nil {
		t.Errorf("no console: %q, %v", text, textErr)
	}
}
