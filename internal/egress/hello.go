package egress

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	// maxHello bounds what is read of a connection to find its ClientHello.
	maxHello = 16 << 10

	recordHandshake = 22
	recordHeader    = 5
	clientHello     = 1
	handshakeHeader = 4
	extensionSNI    = 0
	hostName        = 0
)

// readHello reads a TLS ClientHello, which may come in several records. It
// returns all that it has read, and the name of the server that the guest asks
// for: "" when there is none.
func readHello(r io.Reader) (raw []byte, name string, err error) {
	var message []byte
	for need := handshakeHeader; len(message) < need; {
		start := len(raw)
		if raw, err = readMore(r, raw, recordHeader); err != nil {
			return raw, "", err
		}
		header := raw[start:]
		size := int(binary.BigEndian.Uint16(header[3:]))
		if header[0] != recordHandshake || header[1] != 3 || size == 0 {
			return raw, "", fmt.Errorf("%w: no TLS handshake", errdef.ErrInvalid)
		}
		if raw, err = readMore(r, raw, size); err != nil {
			return raw, "", err
		}
		message = append(message, raw[len(raw)-size:]...)
		if len(message) >= handshakeHeader {
			need = handshakeHeader + int(message[1])<<16 + int(binary.BigEndian.Uint16(message[2:]))
			if message[0] != clientHello || need > maxHello {
				return raw, "", fmt.Errorf("%w: no ClientHello, or a huge one", errdef.ErrInvalid)
			}
			if len(message) >= need {
				name, err = serverName(message[handshakeHeader:need])
				return raw, name, err
			}
		}
	}
	return raw, "", fmt.Errorf("%w: no ClientHello", errdef.ErrInvalid) // not reached
}

func readMore(r io.Reader, raw []byte, n int) ([]byte, error) {
	if len(raw)+n > maxHello {
		return raw, fmt.Errorf("%w: a ClientHello of more than %d bytes", errdef.ErrInvalid, maxHello)
	}
	start := len(raw)
	raw = append(raw, make([]byte, n)...)
	_, err := io.ReadFull(r, raw[start:])
	return raw, err
}

// cursor reads what is packed. After the first thing that does not fit, bad is
// set and all else is empty.
type cursor struct {
	rest []byte
	bad  bool
}

func (c *cursor) take(n int) []byte {
	if n > len(c.rest) {
		c.bad, c.rest = true, nil
		return nil
	}
	taken := c.rest[:n]
	c.rest = c.rest[n:]
	return taken
}

// number reads a number of so many bytes.
func (c *cursor) number(bytes int) int {
	n := 0
	for _, b := range c.take(bytes) {
		n = n<<8 | int(b)
	}
	return n
}

// vector reads what comes with its length, a number of so many bytes, before it.
func (c *cursor) vector(bytes int) []byte { return c.take(c.number(bytes)) }

// serverName finds the name in the body of a ClientHello (RFC 8446, 4.1.2, and
// RFC 6066, 3). It is stricter than servers are: what two readers could take for
// two names is an error. A second ClientHello, after a HelloRetryRequest, is not
// looked at: servers must see to it that it has the name of the first (4.1.2).
func serverName(body []byte) (string, error) {
	c := cursor{rest: body}
	c.take(2 + 32) // version, random
	c.vector(1)    // session
	c.vector(2)    // cipher suites
	c.vector(1)    // compressions
	if len(c.rest) == 0 && !c.bad {
		return "", nil
	}
	extensions := cursor{rest: c.vector(2)}
	if c.bad || len(c.rest) > 0 {
		return "", errHello()
	}
	name, found := "", false
	for len(extensions.rest) > 0 {
		kind, body := extensions.number(2), extensions.vector(2)
		if extensions.bad {
			return "", errHello()
		}
		if kind != extensionSNI {
			continue
		}
		sni := cursor{rest: body}
		list := cursor{rest: sni.vector(2)}
		entry := list.number(1)
		name = string(list.vector(2))
		if sni.bad || list.bad || len(sni.rest) > 0 || len(list.rest) > 0 || entry != hostName || name == "" || found {
			return "", errHello()
		}
		found = true
	}
	return name, nil
}

func errHello() error {
	return fmt.Errorf("%w: ClientHello", errdef.ErrInvalid)
}
