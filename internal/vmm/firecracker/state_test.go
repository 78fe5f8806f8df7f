package firecracker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
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

func appendSum(data []byte) []byte { return binary.LittleEndian.AppendUint64(data, sum(data)) }

func TestVerifyState(t *testing.T) {
	t.Parallel()
	good := bytes.Repeat([]byte("state"), 1000)
	good = appendSum(good)
	flipped := bytes.Clone(good)
	flipped[17] ^= 1
	for name, tt := range map[string]struct {
		data []byte
		ok   bool
	}{
		"good":    {good, true},
		"empty":   {nil, false},
		"short":   {appendSum([]byte("x")), false},
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

func FuzzVerifyState(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(appendSum(make([]byte, minState)))
	f.Add(appendSum(bytes.Repeat([]byte("state"), 300)))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := verifyState(data); err != nil {
			if !errors.Is(err, errdef.ErrInvalid) {
				t.Error(err)
			}
			return
		}
		spoilt := bytes.Clone(data)
		spoilt[len(data)/2] ^= 0x10
		if verifyState(spoilt) == nil || verifyState(appendSum(data)) != nil {
			t.Error("a bit more or less makes no difference")
		}
	})
}

// FuzzReadTemplate: whatever a template is called and has in it, what a snapshot
// says of it is fit for a snapshot.
func FuzzReadTemplate(f *testing.F) {
	f.Add("T2S", []byte("{}"))
	f.Add("own.json", []byte(`{"msr_modifiers":[]}`))
	f.Add("ödd näme\n", []byte("null"))
	f.Fuzz(func(t *testing.T, name string, text []byte) {
		if name != filepath.Base(name) || len(name) > 200 || strings.Contains(name, "\x00") || name == ".." {
			return
		}
		host, err := vmm.ThisHost()
		if err != nil {
			t.Skip(err)
		}
		path := filepath.Join(t.TempDir(), name)
		if err = os.WriteFile(path, text, 0o600); err != nil {
			return // no name for a file
		}
		template, err := readTemplate(path)
		if err != nil {
			if !errors.Is(err, errdef.ErrInvalid) {
				t.Error(err)
			}
			return
		}
		host.Template = template.title
		if err = host.Validate(); err != nil || template.name != "" || template.custom == nil {
			t.Errorf("%+v: %v", template, err)
		}
	})
}
