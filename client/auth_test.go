package client

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

func TestSignVectors(t *testing.T) {
	t.Parallel()
	data, readErr := os.ReadFile("../api/vectors/signing.json")
	if readErr != nil {
		t.Fatal(readErr)
	}
	var all struct {
		Token   string
		Vectors []struct {
			Name, Method, Target, Body, Nonce, Signature string
			Timestamp                                    int64
			Digest                                       string `json:"content_sha256"`
		}
	}
	if err := json.Unmarshal(data, &all); err != nil || len(all.Vectors) == 0 {
		t.Fatalf("%d vectors, %v", len(all.Vectors), err)
	}
	for _, v := range all.Vectors {
		body := strings.NewReader(v.Body)
		req, err := http.NewRequestWithContext(t.Context(), v.Method, "http://127.0.0.1"+v.Target, body)
		if err != nil {
			t.Fatal(err)
		}
		digest, err := digestBody(req, body)
		if err != nil || digest != v.Digest {
			t.Errorf("%s: digest %s, %v", v.Name, digest, err)
		}
		if err = sign(req, all.Token, digest, time.Unix(v.Timestamp, 0), v.Nonce); err != nil {
			t.Error(err)
		}
		if got := req.Header.Get("Tine-Signature"); got != v.Signature {
			t.Errorf("%s: signature %s", v.Name, got)
		}
	}
	if err := sign(&http.Request{}, "tinesign_", "", time.Now(), ""); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a token without a name: %v", err)
	}
}

// TestSignedBodies sends bodies of all kinds: what arrives is what was signed,
// and the token is never sent.
func TestSignedBodies(t *testing.T) {
	t.Parallel()
	const token = "tinesign_ci_secret"
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		digest := sha256.Sum256(body)
		var head bytes.Buffer
		_ = r.Header.Write(&head)
		if err != nil || r.Header.Get("Tine-Content-Sha256") != hex.EncodeToString(digest[:]) || strings.Contains(head.String(), "secret") {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write(body)
	}))
	defer srv.Close()
	c, err := New(Config{URL: srv.URL, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	path := filepath.Join(t.TempDir(), "file")
	if err = os.WriteFile(path, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }() // the client may have
	if _, err = file.Seek(4, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		body io.Reader
		want string
	}{
		"none":       {nil, ""},
		"bytes":      {bytes.NewReader([]byte("abc")), "abc"},
		"file":       {file, "456789"},
		"only_once":  {io.MultiReader(strings.NewReader("x"), strings.NewReader("y")), "xy"},
		"empty_once": {io.MultiReader(), ""},
	} {
		resp, failed := c.send(t.Context(), request{method: http.MethodPut, path: "/x", body: tt.body})
		if failed != nil {
			t.Errorf("%s: %v", name, failed)
			continue
		}
		if got, readErr := io.ReadAll(resp.Body); string(got) != tt.want || readErr != nil {
			t.Errorf("%s: %q, %v", name, got, readErr)
		}
		_ = resp.Body.Close() // it was read
	}
	endless := io.LimitReader(zeros{}, maxUnseen+1)
	err = c.WriteFile(t.Context(), "sb-1", "/x", 0, endless)
	if !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("too much to keep: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
