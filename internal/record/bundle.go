package record

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// Names of what is in a bundle, in this order.
const (
	bundleRecord = "record.json"
	bundleKey    = "key.pem"
	bundleBlobs  = "blobs/"
)

// Bundle is a record from elsewhere: an envelope by itself, or with all of its
// contents.
type Bundle struct {
	Envelope Envelope
	// Key is what came along, and is no reason to trust it; nil when none did.
	Key *Public

	contents map[string][]byte
}

// Whole reports whether the contents came along.
func (b *Bundle) Whole() bool { return b.contents != nil }

// Blob returns a content, as Source says.
func (b *Bundle) Blob(blob Blob) ([]byte, error) {
	data, ok := b.contents[blob.Digest]
	if !ok && blob != blobOf(nil) {
		return nil, fmt.Errorf("%w: content %s", errdef.ErrNotFound, blob.Digest)
	}
	return data, nil
}

// WriteBundle writes a record with its contents and the key that signed it: one
// tar file that has the same bytes whenever it is written.
func WriteBundle(w io.Writer, e Envelope, key Public, from Source) error {
	t := tar.NewWriter(w)
	err := firstOf(
		writeEntry(t, bundleRecord, append(slices.Clip(e.Bytes), '\n')),
		writeEntry(t, bundleKey, key.PEM()),
	)
	if err != nil {
		return err
	}
	for _, b := range e.Record.Blobs() {
		if b.Size == 0 {
			continue
		}
		data, blobErr := from.Blob(b)
		if blobErr == nil {
			blobErr = writeEntry(t, bundleName(b), data)
		}
		if blobErr != nil {
			return fmt.Errorf("bundle record %s: %w", e.Record.ID, blobErr)
		}
	}
	if err = t.Close(); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	return nil
}

func bundleName(b Blob) string { return bundleBlobs + strings.TrimPrefix(b.Digest, digestPrefix) }

func writeEntry(t *tar.Writer, name string, data []byte) error {
	err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(data)), Mode: 0o644, Format: tar.FormatUSTAR})
	if err == nil {
		_, err = t.Write(data)
	}
	if err != nil {
		return fmt.Errorf("write %s of bundle: %w", name, err)
	}
	return nil
}

// ReadBundle reads what WriteBundle has written, or an envelope by itself. It
// holds at most MaxContent bytes, and what the record does not name it refuses.
// It judges form and digests; Verify judges the signature.
func ReadBundle(r io.Reader) (*Bundle, error) {
	in := bufio.NewReader(r)
	first, err := in.Peek(1)
	if errors.Is(err, io.EOF) {
		return nil, invalid("the file is empty")
	}
	if err != nil {
		return nil, fmt.Errorf("read record: %w", err)
	}
	if first[0] == '{' {
		e, readErr := readEnvelope(in, maxEnvelope+1)
		return &Bundle{Envelope: e}, readErr
	}
	read := sha256.New()
	b, err := readTar(tar.NewReader(io.TeeReader(in, read)))
	if err != nil {
		return nil, err
	}
	return b, b.isWritten(in, read)
}

// isWritten sees that what was read, and the rest of it, are the bytes that
// WriteBundle writes: there is but one bundle of a record.
func (b *Bundle) isWritten(rest io.Reader, read hash.Hash) error {
	const most = 64 << 10 // the end of a tar is much shorter
	if _, err := io.Copy(read, io.LimitReader(rest, most)); err != nil {
		return fmt.Errorf("read bundle: %w", err)
	}
	written := sha256.New()
	if err := WriteBundle(written, b.Envelope, *b.Key, b); err != nil {
		return err
	}
	if !bytes.Equal(read.Sum(nil), written.Sum(nil)) {
		return invalid("the bundle is not in its one form")
	}
	return nil
}

func readEnvelope(r io.Reader, limit int64) (Envelope, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return Envelope{}, fmt.Errorf("read record: %w", err)
	}
	if int64(len(data)) > limit {
		return Envelope{}, invalid("envelope of more than %d bytes", limit)
	}
	return Parse(data)
}

func readTar(t *tar.Reader) (*Bundle, error) {
	if err := nextEntry(t, bundleRecord, maxEnvelope+1); err != nil {
		return nil, err
	}
	e, err := readEnvelope(t, maxEnvelope+1)
	if err != nil {
		return nil, err
	}
	b := &Bundle{Envelope: e, contents: map[string][]byte{}}
	if b.Key, err = readKeyEntry(t); err != nil {
		return nil, err
	}
	if b.Key.ID() != e.Record.KeyID {
		return nil, invalid("the bundle has another key than its record names")
	}
	for _, blob := range e.Record.Blobs() {
		if blob.Size == 0 {
			continue
		}
		if err = nextEntry(t, bundleName(blob), blob.Size); err != nil {
			return nil, err
		}
		if b.contents[blob.Digest], err = readBlob(t, blob); err != nil {
			return nil, tarError(err)
		}
	}
	if _, err = t.Next(); !errors.Is(err, io.EOF) {
		return nil, invalid("there is more in the bundle than the record names")
	}
	return b, nil
}

// nextEntry goes to the next file of a tar, which must have that name.
func nextEntry(t *tar.Reader, name string, limit int64) error {
	h, err := t.Next()
	switch {
	case errors.Is(err, io.EOF):
		return invalid("the bundle ends before %s", name)
	case err != nil:
		return tarError(err)
	case h.Name != name || h.Typeflag != tar.TypeReg || len(h.PAXRecords) > 0 || h.Size > limit:
		return invalid("%.100q of %d bytes is where the bundle should have %s", h.Name, h.Size, name)
	}
	return nil
}

func readKeyEntry(t *tar.Reader) (*Public, error) {
	if err := nextEntry(t, bundleKey, maxKey); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(t, maxKey+1))
	if err != nil {
		return nil, tarError(err)
	}
	key, err := ParsePublic(data)
	return &key, err
}

// tarError is errdef.ErrInvalid for a file that is not a tar, is cut short, or
// has other contents than its record names.
func tarError(err error) error {
	if errors.Is(err, errdef.ErrConflict) {
		return invalid("bundle: %s", err.Error()) // nothing of the host is in the way
	}
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("bundle: %w", err)
	}
	return fmt.Errorf("read bundle: %w", err)
}
