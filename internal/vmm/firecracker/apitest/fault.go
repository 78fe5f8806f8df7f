package apitest

import (
	"io"
	"net"
)

// Fault is what happens in place of a request. It reports whether the connection
// stays.
type Fault func(s *Server, conn net.Conn) (alive bool)

// Fault has requests of that method and path, as PUT and /drives/root, go wrong
// from now on; nil has them go right again.
func (s *Server) Fault(method, path string, f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f == nil {
		delete(s.faults, method+" "+path)
		return
	}
	s.faults[method+" "+path] = f
}

// Hang never answers, while the process lives and the caller waits.
func Hang(_ *Server, conn net.Conn) bool {
	var one [1]byte
	_, _ = conn.Read(one[:]) // until somebody hangs up
	return false
}

// HangUp closes the connection without an answer.
func HangUp(*Server, net.Conn) bool { return false }

// Die ends the process without an answer.
func Die(s *Server, _ net.Conn) bool {
	s.Exit(1)
	return false
}

// Refuse answers with a status and a fault message.
func Refuse(status int, message string) Fault {
	return func(_ *Server, conn net.Conn) bool {
		_, err := conn.Write(response(status, false, faultBody(message)))
		return err == nil
	}
}

// Say sends bytes in place of an answer, and then hangs up.
func Say(answer string) Fault {
	return func(_ *Server, conn net.Conn) bool {
		_, _ = io.WriteString(conn, answer)
		return false
	}
}

// SayAndHang sends bytes in place of an answer, and keeps the connection.
func SayAndHang(answer string) Fault {
	return func(s *Server, conn net.Conn) bool {
		_, _ = io.WriteString(conn, answer)
		return Hang(s, conn)
	}
}

// Flood sends a beginning, and then letters for ever.
func Flood(beginning string) Fault {
	return func(_ *Server, conn net.Conn) bool {
		if _, err := io.WriteString(conn, beginning); err != nil {
			return false
		}
		letters := make([]byte, 64<<10)
		for i := range letters {
			letters[i] = 'x'
		}
		for {
			if _, err := conn.Write(letters); err != nil {
				return false
			}
		}
	}
}
