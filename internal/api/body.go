package api

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// limitBody bounds the time that a body may take to come, whoever reads it: the
// server itself does when a handler did not.
func (s *server) limitBody(w http.ResponseWriter, r *http.Request) {
	if r.Body == nil || r.Body == http.NoBody {
		return
	}
	// A writer without deadlines is a test's: its body does not stall.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(s.BodyTime))
}

// readBody reads all of a body that may not be large, and for which its client
// may not take long.
func (s *server) readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength > s.MaxBody { // no need to read what it says itself
		w.Header().Set("Connection", "close")
		return nil, &http.MaxBytesError{Limit: s.MaxBody}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, s.MaxBody))
	if err != nil {
		// The deadline stays: the rest of the body is not to be waited for.
		w.Header().Set("Connection", "close")
		return nil, bodyError(err)
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // as in limitBody
	return body, nil
}

// bodyError says why a body could not be read.
func bodyError(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		slow := fmt.Errorf("%w: the body did not arrive in time", errdef.ErrTimeout)
		return withStatus(slow, http.StatusRequestTimeout)
	}
	return fmt.Errorf("%w: read the body: %w", errdef.ErrInvalid, err)
}

// patient is a body that may be large, but not stand still.
func (s *server) patient(w http.ResponseWriter, body io.ReadCloser) io.ReadCloser {
	return &patientBody{ReadCloser: body, control: http.NewResponseController(w), pause: s.BodyTime}
}

type patientBody struct {
	io.ReadCloser
	control *http.ResponseController
	pause   time.Duration
}

// Read waits for the next bytes, but not for ever.
func (b *patientBody) Read(p []byte) (int, error) {
	_ = b.control.SetReadDeadline(time.Now().Add(b.pause)) // as in limitBody
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return n, bodyError(err)
	}
	if errors.Is(err, io.EOF) {
		_ = b.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

// enterStream takes a place among the streams.
func (s *server) enterStream() (leave func(), err error) {
	select {
	case s.streams <- struct{}{}:
		return func() { <-s.streams }, nil
	default:
		full := fmt.Errorf("%w: %d streams are open", errdef.ErrExhausted, cap(s.streams))
		return nil, errdef.WithHint(full, "close some, or raise --max-streams")
	}
}
