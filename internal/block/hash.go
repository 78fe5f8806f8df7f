package block

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
)

// ContentHash is a SHA-256. Its JSON is Forge's, an array of 32 numbers; HexHash
// is the same as text. Both read either form.
type ContentHash [32]byte

// HexHash is a ContentHash whose JSON is 64 lower-case hexadecimal digits.
type HexHash ContentHash

// ForgeHash is Forge's hash of an output, forge-v1: of stdout and then stderr,
// with nothing between them. Of an input it is ForgeHash(stdin, nil).
func ForgeHash(stdout, stderr []byte) ContentHash {
	h := sha256.New()
	_, _ = h.Write(stdout) // a hash takes everything
	_, _ = h.Write(stderr)
	return ContentHash(h.Sum(nil))
}

// String is 64 lower-case hexadecimal digits.
func (h ContentHash) String() string { return hex.EncodeToString(h[:]) }

// MarshalJSON writes the array.
func (h ContentHash) MarshalJSON() ([]byte, error) {
	numbers := make([]int, len(h)) // a slice of bytes would become base64
	for i, b := range h {
		numbers[i] = int(b)
	}
	return json.Marshal(numbers)
}

// UnmarshalJSON reads the array or the digits.
func (h *ContentHash) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '"' {
		return h.unmarshalHex(data)
	}
	var numbers []uint8x
	if err := json.Unmarshal(data, &numbers); err != nil {
		return fmt.Errorf("%w: content hash: want 32 numbers from 0 to 255, or 64 hexadecimal digits", errdef.ErrInvalid)
	}
	if len(numbers) != len(h) {
		return fmt.Errorf("%w: content hash of %d bytes: want %d", errdef.ErrInvalid, len(numbers), len(h))
	}
	for i, n := range numbers {
		h[i] = byte(n)
	}
	return nil
}

// uint8x is a byte of which encoding/json does not take a slice for base64, and
// which null does not make zero.
type uint8x uint8

func (n *uint8x) UnmarshalJSON(data []byte) error {
	var v *uint8
	if err := json.Unmarshal(data, &v); err != nil {
		return err
	}
	if v == nil {
		return fmt.Errorf("%w: null", errdef.ErrInvalid)
	}
	*n = uint8x(*v)
	return nil
}

func (h *ContentHash) unmarshalHex(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		return fmt.Errorf("%w: content hash: %w", errdef.ErrInvalid, err)
	}
	v, err := ParseHash(text)
	if err == nil {
		*h = v
	}
	return err
}

// ParseHash reads 64 lower-case hexadecimal digits.
func ParseHash(text string) (ContentHash, error) {
	data, err := hex.DecodeString(text)
	if err != nil || len(data) != len(ContentHash{}) || hex.EncodeToString(data) != text {
		return ContentHash{}, fmt.Errorf("%w: content hash %.80q: want 64 lower-case hexadecimal digits", errdef.ErrInvalid, text)
	}
	return ContentHash(data), nil
}

// MarshalJSON writes the digits.
func (h HexHash) MarshalJSON() ([]byte, error) { return json.Marshal(ContentHash(h).String()) }

// UnmarshalJSON reads the array or the digits.
func (h *HexHash) UnmarshalJSON(data []byte) error { return (*ContentHash)(h).UnmarshalJSON(data) }
