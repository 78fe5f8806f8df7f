package relink

import (
	"encoding/binary"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
)

const magic = "TRLK"

// What a hello wants, and how it is answered.
const (
	wantNew    byte = 1
	wantResume byte = 2

	saidYes     byte = 1
	saidUnknown byte = 2
	saidVersion byte = 3 // the guest does not speak the host's
)

const (
	placeSize  = 8 + 8
	helloSize  = len(magic) + 2 + IDSize + placeSize
	answerSize = len(magic) + 2 + placeSize
)

// place is how far an end has come with what the other sent.
type place struct {
	received uint64 // bytes, all in all
	read     uint64 // of them, by whoever reads the stream
}

func (p place) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, p.received)
	return binary.BigEndian.AppendUint64(b, p.read)
}

func parsePlace(b []byte) place {
	return place{received: binary.BigEndian.Uint64(b), read: binary.BigEndian.Uint64(b[8:])}
}

// hello is what a host begins a connection with.
type hello struct {
	want byte
	id   [IDSize]byte
	place
}

func (h hello) encode() []byte {
	b := append(make([]byte, 0, helloSize), magic...)
	b = append(b, Version, h.want)
	return h.place.append(append(b, h.id[:]...))
}

// parseHello reads a hello of helloSize bytes. Of another version it is
// errdef.ErrUnsupported.
func parseHello(b []byte) (h hello, err error) {
	if err = parseHead(b); err != nil {
		return hello{}, err
	}
	b = b[len(magic)+1:]
	h.want = b[0]
	copy(h.id[:], b[1:])
	h.place = parsePlace(b[1+IDSize:])
	if h.want != wantNew && h.want != wantResume {
		return hello{}, violation("hello that wants %d", h.want)
	}
	if h.want == wantNew && h.place != (place{}) {
		return hello{}, violation("new stream that does not begin at its beginning")
	}
	return h, nil
}

func parseHead(b []byte) error {
	if string(b[:len(magic)]) != magic {
		return violation("connection that begins with %q", b[:len(magic)])
	}
	if v := b[len(magic)]; v != Version {
		return fmt.Errorf("%w: other end speaks version %d, this %d", errdef.ErrUnsupported, v, Version)
	}
	return nil
}

// answer is what a guest says to it.
type answer struct {
	said byte
	place
}

func (a answer) encode() []byte {
	b := append(make([]byte, 0, answerSize), magic...)
	return a.place.append(append(b, Version, a.said))
}

// parseAnswer reads an answer of answerSize bytes; one that is not yes is an
// error.
func parseAnswer(b []byte) (place, error) {
	if err := parseHead(b); err != nil {
		return place{}, err
	}
	switch said := b[len(magic)+1]; said {
	case saidYes:
		return parsePlace(b[len(magic)+2:]), nil
	case saidUnknown:
		return place{}, fmt.Errorf("%w: %w", errdef.ErrUnavailable, ErrUnknown)
	default:
		return place{}, violation("answer %d", said)
	}
}

// kind says what a frame is.
type kind byte

const (
	kindData kind = 1 // u16 length, and as many bytes
	kindAck  kind = 2 // u64: how many bytes were read, all in all
	kindBye  kind = 3 // the end closed the stream, and has sent all
)

const maxHead = 1 + 8

func (k kind) headSize() int {
	switch k {
	case kindData:
		return 1 + 2
	case kindAck:
		return 1 + 8
	default:
		return 1
	}
}

func appendData(b, data []byte) []byte {
	b = append(b, byte(kindData))
	b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
	return append(b, data...)
}

func appendAck(b []byte, read uint64) []byte {
	return binary.BigEndian.AppendUint64(append(b, byte(kindAck)), read)
}

func appendBye(b []byte) []byte { return append(b, byte(kindBye)) }

// frame is a frame, or a piece of one that carries data.
type frame struct {
	kind kind // 0 is none: more bytes are needed
	data []byte
	read uint64
}

// decoder finds the frames in what comes on one connection, however it is cut.
type decoder struct {
	head [maxHead]byte
	have int // bytes of head
	left int // bytes of a data frame
}

// next takes n bytes off b, and at least one, which must not be empty. Data
// comes as a slice of b.
func (d *decoder) next(b []byte) (f frame, n int, err error) {
	if d.left > 0 {
		n = min(d.left, len(b))
		d.left -= n
		return frame{kind: kindData, data: b[:n]}, n, nil
	}
	if d.have == 0 {
		d.head[0] = b[0]
		d.have, n = 1, 1
	}
	size := kind(d.head[0]).headSize()
	more := copy(d.head[d.have:size], b[n:])
	d.have += more
	n += more
	if d.have < size {
		return frame{}, n, nil
	}
	d.have = 0
	f, err = d.begin(d.head[:size])
	return f, n, err
}

// begin reads a whole head.
func (d *decoder) begin(head []byte) (frame, error) {
	switch k := kind(head[0]); k {
	case kindData:
		d.left = int(binary.BigEndian.Uint16(head[1:]))
		if d.left == 0 || d.left > MaxData {
			return frame{}, violation("frame of %d bytes", d.left)
		}
		return frame{}, nil
	case kindAck:
		return frame{kind: k, read: binary.BigEndian.Uint64(head[1:])}, nil
	case kindBye:
		return frame{kind: k}, nil
	default:
		return frame{}, violation("frame of kind %d", k)
	}
}
