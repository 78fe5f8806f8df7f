package block

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
)

// UUID is what Forge's ids are. It prints hyphenated, in lower case.
type UUID [16]byte

// ID names a block.
type ID struct{ UUID }

// ExecutionID names an execution.
type ExecutionID struct{ UUID }

// SnapshotID names a snapshot.
type SnapshotID struct{ UUID }

// NewUUID returns a random one (version 4).
func NewUUID() UUID {
	var u UUID
	_, _ = rand.Read(u[:]) // it never fails
	return u.stamp(4)
}

// UUIDOf returns the id that stands for a name of ours where Forge wants a
// UUID: equal names have equal ids (version 8: made of a hash).
func UUIDOf(name string) UUID {
	sum := sha256.Sum256([]byte("tine-id-1\n" + name))
	return UUID(sum[:16]).stamp(8)
}

// stamp puts version and variant in their places.
func (u UUID) stamp(version byte) UUID {
	u[6] = u[6]&0x0f | version<<4
	u[8] = u[8]&0x3f | 0x80
	return u
}

// String is the hyphenated form.
func (u UUID) String() string {
	h := hex.EncodeToString(u[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// MarshalText writes the hyphenated form.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// ParseUUID reads the four forms that Forge reads: hyphenated, the 32 digits
// alone, in braces, and as a URN; digits in either case, any version.
func ParseUUID(text string) (UUID, error) {
	digits := text
	if inner, ok := strings.CutPrefix(digits, "urn:uuid:"); ok {
		if len(inner) != 36 {
			return UUID{}, errors.New("urn:uuid: wants 36 characters after it")
		}
		digits = inner
	} else if inner, ok = strings.CutPrefix(digits, "{"); ok {
		if digits, ok = strings.CutSuffix(inner, "}"); !ok || len(digits) != 36 {
			return UUID{}, errors.New("braces want 36 characters and a closing one")
		}
	}
	switch {
	case len(digits) == 32:
	case len(digits) == 36 && digits[8] == '-' && digits[13] == '-' && digits[18] == '-' && digits[23] == '-':
		digits = digits[:8] + digits[9:13] + digits[14:18] + digits[19:23] + digits[24:]
	default:
		return UUID{}, errors.New("want 32 hexadecimal digits, alone or in groups of 8-4-4-4-12")
	}
	var u UUID
	if _, err := hex.Decode(u[:], []byte(digits)); err != nil {
		return UUID{}, errors.New("it has what is no hexadecimal digit")
	}
	return u, nil
}

func (u *UUID) parse(what string, text []byte) error {
	v, err := ParseUUID(string(text))
	if err != nil {
		return idError(what, err.Error())
	}
	*u = v
	return nil
}

// UnmarshalText reads the forms of ParseUUID.
func (id *ID) UnmarshalText(text []byte) error { return id.parse("block", text) }

// UnmarshalText reads the forms of ParseUUID.
func (id *ExecutionID) UnmarshalText(text []byte) error { return id.parse("execution", text) }

// UnmarshalText reads the forms of ParseUUID.
func (id *SnapshotID) UnmarshalText(text []byte) error { return id.parse("snapshot", text) }
