package record

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// Schemes of hashing. docs/formats/record.md has both in full.
const (
	// ForgeV1 is Forge's: stdout and stderr one after the other. It covers no
	// exit code, and the same text on the other stream has the same hash.
	ForgeV1 = "forge-v1"
	// TineV1 frames every field of an input or output, so that no two different
	// ones are hashed as the same bytes.
	TineV1 = "tine-v1"
)

// The domains of tine-v1: an input is never hashed as the bytes of an output.
const (
	inputDomain  = "tine-v1 input"
	outputDomain = "tine-v1 output"
)

const digestPrefix = "sha256:"

// Digest names bytes: "sha256:" and the hexadecimal SHA-256.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return digestPrefix + hex.EncodeToString(sum[:])
}

// checkDigest sees that s is a digest in its one form.
func checkDigest(s string) error {
	rest, ok := strings.CutPrefix(s, digestPrefix)
	if raw, err := hex.DecodeString(rest); !ok || err != nil || len(raw) != sha256.Size || strings.ToLower(rest) != rest {
		return fmt.Errorf("%w: digest %.80q", errdef.ErrInvalid, s)
	}
	return nil
}

// HashInput is the tine-v1 hash of what a run is a function of: its input, and
// the digest of the snapshot that it starts from. It covers every field but
// Limits.Wall, which no output depends on.
func HashInput(snapshot string, in Input) string {
	return sum(func(w io.Writer) { frameInput(w, snapshot, in) })
}

// HashOutput is the tine-v1 hash of an output. It covers every field but Wall,
// which is the host's, and Memory, which is compared by itself where it was
// asked for.
func HashOutput(out Output) string {
	return sum(func(w io.Writer) { frameOutput(w, out) })
}

// ForgeHash is the forge-v1 hash of two streams; of an input, stdin is the
// first and the second is empty.
func ForgeHash(stdout, stderr []byte) string {
	return sum(func(w io.Writer) {
		_, _ = w.Write(stdout) // a hash takes all
		_, _ = w.Write(stderr)
	})
}

func sum(write func(io.Writer)) string {
	h := sha256.New()
	write(h)
	return digestPrefix + hex.EncodeToString(h.Sum(nil))
}

func frameInput(w io.Writer, snapshot string, in Input) {
	f := framer{w}
	f.text(inputDomain)
	f.text(snapshot)
	f.texts(in.Argv)
	f.texts(in.Env)
	f.text(in.Cwd)
	f.bytes(in.Stdin)
	f.files(in.Files)
	f.texts(in.Collect)
	f.number(in.Seed)
	f.number(uint64(in.Start.Unix()))
	f.number(uint64(in.Start.Nanosecond()))
	f.number(uint64(in.Limits.Virtual))
	f.number(uint64(in.Limits.Output))
}

func frameOutput(w io.Writer, out Output) {
	f := framer{w}
	f.text(outputDomain)
	f.bytes(out.Stdout)
	f.bytes(out.Stderr)
	f.number(uint64(int64(out.Exit)))
	f.text(out.Signal)
	f.text(out.Failure)
	f.files(out.Files)
	f.number(uint64(out.Virtual))
}

// framer writes values so that they can be read back: numbers in 8 bytes, big
// end first; bytes after their number; lists after the number of their items.
// What it writes to is a hash or a buffer, which take all.
type framer struct{ w io.Writer }

func (f framer) number(n uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	_, _ = f.w.Write(b[:])
}

func (f framer) bytes(b []byte) {
	f.number(uint64(len(b)))
	_, _ = f.w.Write(b)
}

func (f framer) text(s string) {
	f.number(uint64(len(s)))
	_, _ = io.WriteString(f.w, s)
}

func (f framer) texts(list []string) {
	f.number(uint64(len(list)))
	for _, s := range list {
		f.text(s)
	}
}

func (f framer) files(list []File) {
	f.number(uint64(len(list)))
	for _, file := range list {
		f.text(file.Path)
		f.number(uint64(file.Mode))
		f.bytes(file.Data)
	}
}
