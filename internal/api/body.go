package api

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	// maxLarge is how many large bodies are in memory at once, and
	// largeBodyTimes how much longer than others they may take to come.
	maxLarge       = 2
	largeBodyTimes = 10
)

// largeLimit is what a route's body may have, where that is more than others.
func largeLimit(pattern string) int64 {
	switch pattern {
	case runPattern, blockRunPattern, blockFilePattern:
		return maxRunBody
	case verifyPattern:
		return maxVerifyBody
	}
	return 0
}

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

// serveLarge is checkBody for the routes whose bodies may be larger than others:
// only so many of these are in memory at once.
func (s *server) serveLarge(next http.Handler, w http.ResponseWriter, r *http.Request, limit int64) error {
	if r.ContentLength > limit { // no need to read what it says itself
		w.Header().Set("Connection", "close")
		return &http.MaxBytesError{Limit: limit}
	}
	if r.ContentLength < 0 || r.ContentLength > s.MaxBody {
		select {
		case s.large <- struct{}{}:
			defer func() { <-s.large }()
		default:
			w.Header().Set("Connection", "close")
			return fmt.Errorf("%w: %d large requests are under way", errdef.ErrExhausted, cap(s.large))
		}
	}
	body, err := s.readLarge(w, r, limit)
	if err != nil {
		w.Header().Set("Connection", "close") // as in readBody
		return err
	}
	if err = checkJSON(r.Header.Get("Content-Type"), body); err != nil {
		return err
	}
	r.Body = newHeld(body)
	next.ServeHTTP(w, r)
	return nil
}

func (s *server) readLarge(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	patient := &patientBody{
		ReadCloser: r.Body, control: http.NewResponseController(w), pause: s.BodyTime, until: time.Now().Add(largeBodyTimes * s.BodyTime),
	}
	var body bytes.Buffer
	body.Grow(int(max(r.ContentLength, 0)) + bytes.MinRead) // it is at most limit
	if _, err := body.ReadFrom(http.MaxBytesReader(w, patient, limit)); err != nil {
		return nil, bodyError(err)
	}
	return body.Bytes(), nil
}

// held is a body that is in memory, for who reads it next.
type held struct {
	bytes.Reader
	data []byte
}

func newHeld(data []byte) *held {
	h := &held{data: data}
	h.Reset(data)
	return h
}

// Close does nothing.
func (h *held) Close() error { return nil }

// wholeBody returns all of a body, which can be read again.
func wholeBody(r *http.Request) ([]byte, error) {
	if h, ok := r.Body.(*held); ok {
		return h.data, nil
	}
	data, err := io.ReadAll(r.Body)
	r.Body = newHeld(data)
	return data, err
}

// takeBody returns all of a body, which then is nobody's but the caller's.
func takeBody(r *http.Request) ([]byte, error) {
	data, err := wholeBody(r)
	if h, ok := r.Body.(*held); ok {
		h.data = nil
		h.Reset(nil)
	}
	return data, err
}

// patientWriter is an answer that may be large, but not stand still.
type patientWriter struct{ http.ResponseWriter }

// Write waits for the client, but not for ever.
func (p patientWriter) Write(data []byte) (int, error) {
	control := http.NewResponseController(p.ResponseWriter)
	_ = control.SetWriteDeadline(time.Now().Add(answerTime)) // as in limitBody
	defer func() { _ = control.SetWriteDeadline(time.Time{}) }()
	return p.ResponseWriter.Write(data)
}

// patient is a body that may be large, but not stand still.
func (s *server) patient(w http.ResponseWriter, body io.ReadCloser) io.ReadCloser {
	return &patientBody{ReadCloser: body, control: http.NewResponseController(w), pause: s.BodyTime}
}

type patientBody struct {
	io.ReadCloser
	control *http.ResponseController
	pause   time.Duration
	until   time.Time // zero: as long as it moves
}

// Read waits for the next bytes, but not for ever.
func (b *patientBody) Read(p []byte) (int, error) {
	deadline := time.Now().Add(b.pause)
	if !b.until.IsZero() && b.until.Before(deadline) {
		deadline = b.until
	}
	_ = b.control.SetReadDeadline(deadline) // as in limitBody
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
