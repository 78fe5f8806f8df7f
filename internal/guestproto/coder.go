package guestproto

import (
	"encoding/binary"
	"fmt"
)

// Message is a value that crosses the link. Its fields are only ever added at
// the end: a decoder that runs out of bytes between two fields leaves the rest
// zero, and ignores bytes after the last field it knows.
type Message interface {
	code(c *coder)
}

// Append appends m's encoding to dst.
func Append(dst []byte, m Message) []byte {
	c := coder{buf: dst}
	m.code(&c)
	return c.buf
}

// Encode returns m's encoding.
func Encode(m Message) []byte { return Append(nil, m) }

// Decode reads m, a zero value, from b. It keeps no reference to b.
func Decode(b []byte, m Message) error {
	c := coder{buf: b, decoding: true}
	m.code(&c)
	if c.bad {
		return fmt.Errorf("%w: malformed %T", ErrProtocol, m)
	}
	return nil
}

// coder goes over the fields of a message, in order, and writes or reads each:
// integers as zigzag varints, bytes and strings with their length before them.
type coder struct {
	buf      []byte
	decoding bool
	bad      bool
}

// more reports whether there is a field left to decode.
func (c *coder) more() bool { return !c.bad && len(c.buf) > 0 }

func (c *coder) varint() int64 {
	v, n := binary.Varint(c.buf)
	if n <= 0 {
		c.bad = true
		return 0
	}
	c.buf = c.buf[n:]
	return v
}

// take cuts a length and that many bytes off the buffer.
func (c *coder) take() []byte {
	size, n := binary.Uvarint(c.buf)
	if n <= 0 || size > uint64(len(c.buf)-n) {
		c.bad = true
		return nil
	}
	p := c.buf[n : n+int(size)]
	c.buf = c.buf[n+int(size):]
	return p
}

// integer is any whole number that a message holds.
type integer interface {
	~int | ~int64 | ~uint32 | ~uint8
}

func number[T integer](c *coder, p *T) {
	if !c.decoding {
		c.buf = binary.AppendVarint(c.buf, int64(*p))
	} else if c.more() {
		v := c.varint()
		if *p = T(v); int64(*p) != v {
			c.bad = true
		}
	}
}

func (c *coder) bool(p *bool) {
	var v uint8
	if *p {
		v = 1
	}
	number(c, &v)
	if c.decoding {
		*p = v != 0
	}
}

func (c *coder) string(p *string) {
	if !c.decoding {
		c.buf = binary.AppendUvarint(c.buf, uint64(len(*p)))
		c.buf = append(c.buf, *p...)
	} else if c.more() {
		*p = string(c.take())
	}
}

func (c *coder) bytes(p *[]byte) {
	if !c.decoding {
		c.buf = binary.AppendUvarint(c.buf, uint64(len(*p)))
		c.buf = append(c.buf, *p...)
	} else if c.more() {
		*p = append([]byte(nil), c.take()...)
	}
}

// count codes the length of a list whose elements take a byte at least.
func (c *coder) count(n int) int {
	if !c.decoding {
		c.buf = binary.AppendUvarint(c.buf, uint64(n))
		return n
	}
	if !c.more() {
		return 0
	}
	v, used := binary.Uvarint(c.buf)
	if used <= 0 || v > uint64(len(c.buf)-used) {
		c.bad = true
		return 0
	}
	c.buf = c.buf[used:]
	return int(v)
}

func (c *coder) strings(p *[]string) {
	n := c.count(len(*p))
	if c.decoding && n > 0 {
		*p = make([]string, n)
	}
	for i := range *p {
		if c.decoding && !c.more() {
			c.bad = true
			return
		}
		c.string(&(*p)[i])
	}
}

// messages codes a list of messages, each with its length before it so that it
// may grow fields of its own.
func messages[T any, P interface {
	*T
	Message
}](c *coder, p *[]T) {
	n := c.count(len(*p))
	for i := range n {
		if !c.decoding {
			var elem coder
			P(&(*p)[i]).code(&elem)
			c.bytes(&elem.buf)
			continue
		}
		if !c.more() {
			c.bad = true
			return
		}
		elem := coder{buf: c.take(), decoding: true}
		var v T
		P(&v).code(&elem)
		c.bad = c.bad || elem.bad
		*p = append(*p, v)
	}
}
