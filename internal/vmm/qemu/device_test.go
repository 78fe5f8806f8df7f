package qemu

import (
	"bytes"
	"errors"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

func TestBareState(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		state string
		bare  bool
		err   error
	}{
		"frozen":        {"QEVM\x00\x00\x00\x03\x07rest", false, nil},
		"saved":         {"QEVM\x00\x00\x00\x03\x04rest", true, nil},
		"header-only":   {"QEVM\x00\x00\x00\x03\x04", true, nil},
		"empty":         {"", false, errdef.ErrInvalid},
		"short":         {"QEVM\x00\x00\x00\x03", false, errdef.ErrInvalid},
		"other-magic":   {"QFVM\x00\x00\x00\x03\x07", false, errdef.ErrInvalid},
		"other-version": {"QEVM\x00\x00\x00\x02\x07", false, errdef.ErrInvalid},
		"with-memory":   {"QEVM\x00\x00\x00\x03\x01", false, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bare, err := bareState(bytes.NewReader([]byte(tt.state)))
			if bare != tt.bare || !errors.Is(err, tt.err) {
				t.Errorf("bareState: %v, error %v, want %v, error %v", bare, err, tt.bare, tt.err)
			}
		})
	}
}

func FuzzBareState(f *testing.F) {
	f.Add([]byte("QEVM\x00\x00\x00\x03\x07"))
	f.Add([]byte("QEVM\x00\x00\x00\x03\x04"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, state []byte) {
		bare, err := bareState(bytes.NewReader(state))
		if err != nil && !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("error %v, want ErrInvalid", err)
		}
		if err == nil && bare != bytes.HasPrefix(state, []byte("QEVM\x00\x00\x00\x03\x04")) {
			t.Errorf("%q: bare is %v", state, bare)
		}
	})
}
