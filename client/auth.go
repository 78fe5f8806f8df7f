package client

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	// signPrefix begins the tokens that are never sent: they sign requests.
	signPrefix = "tinesign_"
	// maxUnseen bounds a body that can be read only once and must be signed: it
	// is kept in memory.
	maxUnseen = 64 << 20
)

// authorize shows who makes a request: it sends the token, or signs with it.
// body is what the request has its body from, or nil.
func (c *Client) authorize(req *http.Request, body io.Reader) error {
	switch {
	case c.token == "":
		return nil
	case !strings.HasPrefix(c.token, signPrefix):
		req.Header.Set("Authorization", "Bearer "+c.token)
		return nil
	}
	digest, err := digestBody(req, body)
	if err != nil {
		return err
	}
	return sign(req, c.token, digest, time.Now(), rand.Text())
}

// sign adds the headers that docs/formats/signing.md describes.
func sign(req *http.Request, token, digest string, now time.Time, nonce string) error {
	name, _, found := strings.Cut(strings.TrimPrefix(token, signPrefix), "_")
	if !found || name == "" {
		return fmt.Errorf("%w: a token that begins with %s has no name", errdef.ErrInvalid, signPrefix)
	}
	path, query, _ := strings.Cut(req.URL.RequestURI(), "?")
	at := strconv.FormatInt(now.Unix(), 10)
	key := sha256.Sum256([]byte(token))
	mac := hmac.New(sha256.New, key[:])
	_, _ = io.WriteString(mac, strings.Join([]string{"tine-sign-1", name, req.Method, path, query, digest, at, nonce}, "\n")) // a hash takes everything
	h := req.Header
	h.Set("Tine-Token", name)
	h.Set("Tine-Timestamp", at)
	h.Set("Tine-Nonce", nonce)
	h.Set("Tine-Content-Sha256", digest)
	h.Set("Tine-Signature", hex.EncodeToString(mac.Sum(nil)))
	return nil
}

// digestBody reads the body, to be read again when it is sent. from is where
// the request has it from.
func digestBody(req *http.Request, from io.Reader) (string, error) {
	h := sha256.New()
	if from != nil {
		if err := rewindable(req, from); err != nil {
			return "", err
		}
		body, err := req.GetBody()
		if err == nil {
			_, err = io.Copy(h, body)
		}
		if err == nil {
			req.Body, err = req.GetBody()
		}
		if err != nil {
			return "", fmt.Errorf("read the body: %w", err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// rewindable sees that the body can be read twice: net/http knows how, or it
// can seek, or it is short enough to be kept.
func rewindable(req *http.Request, from io.Reader) error {
	if req.GetBody != nil {
		return nil
	}
	if seeker, ok := from.(io.Seeker); ok {
		if start, err := seeker.Seek(0, io.SeekCurrent); err == nil { // a pipe cannot
			body := req.Body
			req.GetBody = func() (io.ReadCloser, error) {
				_, err := seeker.Seek(start, io.SeekStart)
				return body, err
			}
			return nil
		}
	}
	data, err := io.ReadAll(io.LimitReader(from, maxUnseen+1))
	if err != nil {
		return fmt.Errorf("read the body: %w", err)
	}
	if len(data) > maxUnseen {
		return errdef.WithHint(fmt.Errorf("%w: a body of more than %d bytes that cannot be read twice cannot be signed", errdef.ErrInvalid, maxUnseen),
			"give a file, or use a token that does not sign")
	}
	req.ContentLength = int64(len(data))
	req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	return nil
}
