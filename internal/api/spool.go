package api

import (
	"bytes"
	"io"
	"sync"

	"github.com/tinevm/tine/internal/wire"
)

// pieceSize is the most output that one line has.
const pieceSize = 64 << 10

// spool passes output on to a client, in a goroutine of its own: who writes does
// not wait for the client, since a clock of the host runs meanwhile. What waits
// in here is bounded by the limit of the run's output.
type spool struct {
	out  *lineWriter
	done chan struct{} // closed when all was passed on

	mu    sync.Mutex
	more  sync.Cond // of mu: queue, over
	queue []wire.RunOutput
	over  bool
	err   error
}

// newSpool returns a spool, which must be ended.
func newSpool(out *lineWriter) *spool {
	s := &spool{out: out, done: make(chan struct{})}
	s.more.L = &s.mu
	go s.drain()
	return s
}

// end waits until all was passed on, and says whether it was.
func (s *spool) end() error {
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.more.Signal()
	<-s.done
	return s.err
}

func (s *spool) drain() {
	defer close(s.done)
	for {
		batch := s.next()
		if batch == nil {
			return
		}
		for _, piece := range batch {
			if err := s.out.write(wire.ProgressLine{Output: &piece}); err != nil {
				s.mu.Lock()
				s.err = err
				s.mu.Unlock()
				return
			}
		}
	}
}

// next waits for output; nil is the end.
func (s *spool) next() []wire.RunOutput {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) == 0 && !s.over {
		s.more.Wait()
	}
	batch := s.queue
	s.queue = nil
	return batch
}

// stream is a writer for the output of that name.
func (s *spool) stream(name string) io.Writer { return spoolStream{s, name} }

type spoolStream struct {
	*spool
	name string
}

// Write takes data, unless the client cannot be reached any more.
func (s spoolStream) Write(data []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	n := len(data)
	for data = bytes.Clone(data); len(data) > 0; {
		piece := data[:min(len(data), pieceSize)]
		data = data[len(piece):]
		line := wire.RunOutput{Stream: s.name}
		line.Text, line.Base64 = asText(piece)
		s.queue = append(s.queue, line)
	}
	s.more.Signal()
	return n, nil
}
