package guestproto

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
)

// On the wire a frame is type u8, stream uvarint, payload length uvarint and
// payload, stuffed by COBS so that it holds no zero byte, then one zero byte.
//
// The length is the only check. What can happen to frames on this link is that
// one is cut off, or that the rest of one runs into the next; both change the
// length. Nothing flips bits in a memory copy, and against a hostile guest no
// checksum helps; so a CRC, which would touch every byte once more under
// emulation, would buy nothing.

const (
	maxHeader  = 1 + 2*binary.MaxVarintLen32
	maxFrame   = maxHeader + MaxPayload
	maxEncoded = maxFrame + maxFrame/254 + 2
	readSize   = 64 << 10
	maxRun     = 254
)

// Frame is one decoded frame.
type Frame struct {
	Type    FrameType
	Stream  uint32
	Payload []byte
}

// FrameWriter sends frames. The parts together are the payload, at most
// MaxPayload long, and belong to the caller again when WriteFrame returns.
type FrameWriter interface {
	WriteFrame(ctx context.Context, t FrameType, stream uint32, parts ...[]byte) error
}

// AppendFrame appends the frame as it goes on the wire, delimiter included.
func AppendFrame(dst []byte, t FrameType, stream uint32, parts ...[]byte) []byte {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	var head [maxHeader]byte
	h := append(head[:0], byte(t))
	h = binary.AppendUvarint(h, uint64(stream))
	h = binary.AppendUvarint(h, uint64(size))
	s := newStuffer(dst)
	s.write(h)
	for _, p := range parts {
		s.write(p)
	}
	return s.close()
}

// stuffer encodes consistent overhead byte stuffing: a block is one code byte
// c, c-1 bytes that are not zero, and, unless c is 255, a zero left out.
type stuffer struct {
	dst  []byte
	code int // index of the open block's code byte
	run  int // bytes in the open block
}

func newStuffer(dst []byte) stuffer {
	return stuffer{dst: append(dst, 0), code: len(dst)}
}

func (s *stuffer) write(p []byte) {
	for len(p) > 0 {
		chunk := p[:min(maxRun-s.run, len(p))]
		zero := bytes.IndexByte(chunk, 0)
		if zero >= 0 {
			chunk = chunk[:zero]
		}
		s.dst = append(s.dst, chunk...)
		s.run += len(chunk)
		p = p[len(chunk):]
		if zero >= 0 {
			p = p[1:]
			s.next()
		} else if s.run == maxRun {
			s.next()
		}
	}
}

// next ends the open block and opens another.
func (s *stuffer) next() {
	s.dst[s.code] = byte(s.run + 1)
	s.code, s.run = len(s.dst), 0
	s.dst = append(s.dst, 0)
}

// close ends the last block and adds the delimiter.
func (s *stuffer) close() []byte {
	s.dst[s.code] = byte(s.run + 1)
	return append(s.dst, 0)
}

// unstuff decodes b in place.
func unstuff(b []byte) ([]byte, bool) {
	out := b[:0]
	for len(b) > 0 {
		code := int(b[0])
		if code == 0 || code > len(b) {
			return nil, false
		}
		out = append(out, b[1:code]...)
		b = b[code:]
		if code <= maxRun && len(b) > 0 {
			out = append(out, 0)
		}
	}
	return out, true
}

// parseFrame decodes one frame, without its delimiter, in place.
func parseFrame(raw []byte) (Frame, error) {
	b, ok := unstuff(raw)
	if !ok || len(b) < 3 || b[0] == 0 {
		return Frame{}, ErrBadFrame
	}
	stream, n := binary.Uvarint(b[1:])
	if n <= 0 || stream > 1<<32-1 {
		return Frame{}, ErrBadFrame
	}
	rest := b[1+n:]
	size, m := binary.Uvarint(rest)
	if m <= 0 || size > MaxPayload || size != uint64(len(rest)-m) {
		return Frame{}, ErrBadFrame
	}
	return Frame{Type: FrameType(b[0]), Stream: uint32(stream), Payload: rest[m:]}, nil
}

// Reader finds frames in a byte stream.
type Reader struct {
	r          io.Reader
	buf        []byte
	start, end int // buf[start:end] is read and not yet used
	scanned    int // buf[start:scanned] holds no delimiter
	skipping   bool
}

// NewReader returns a Reader of r. Its memory is bounded, whatever r holds.
func NewReader(r io.Reader) *Reader {
	return &Reader{r: r, buf: make([]byte, maxEncoded+readSize)}
}

// Next returns the next frame; its payload is good until the next call. After
// ErrBadFrame it may be called again, and goes on at the next delimiter. Any
// other error is the reader's own.
func (r *Reader) Next() (Frame, error) {
	for {
		raw, ok := r.line()
		if !ok {
			if err := r.fill(); err != nil {
				return Frame{}, err
			}
			continue
		}
		if r.skipping || len(raw) > maxEncoded {
			r.skipping = false
			return Frame{}, ErrBadFrame
		}
		if len(raw) > 0 {
			return parseFrame(raw)
		}
	}
}

// Buffered reports whether a whole frame may be read without waiting.
func (r *Reader) Buffered() bool {
	return bytes.IndexByte(r.buf[r.scanned:r.end], 0) >= 0
}

// line cuts the bytes up to the next delimiter off the buffer.
func (r *Reader) line() ([]byte, bool) {
	i := bytes.IndexByte(r.buf[r.scanned:r.end], 0)
	if i < 0 {
		r.scanned = r.end
		return nil, false
	}
	raw := r.buf[r.start : r.scanned+i]
	r.start = r.scanned + i + 1
	r.scanned = r.start
	return raw, true
}

// fill reads more, after dropping a frame that is too long already.
func (r *Reader) fill() error {
	if r.skipping || r.end-r.start > maxEncoded {
		r.skipping = true
		r.start = r.end
	}
	if r.start > 0 {
		r.end = copy(r.buf, r.buf[r.start:r.end])
		r.start, r.scanned = 0, r.end
	}
	const patience = 100 // a Reader may return nothing now and then
	for range patience {
		n, err := r.r.Read(r.buf[r.end:])
		r.end += n
		switch {
		case n > 0:
			return nil
		case errors.Is(err, io.EOF) && r.end > r.start:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
	return io.ErrNoProgress
}
