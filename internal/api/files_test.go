package api_test

import (
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/wire"
)

func TestFiles(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	base += "/v1/sandboxes/sb-1/files"
	dir := t.TempDir()
	at := func(name string) string { return "?path=" + url.QueryEscape(filepath.Join(dir, name)) }

	content := strings.Repeat("bytes\x00", 10_000)
	if a := send(t, "PUT", base+at("sub/a")+"&mode=0600", "application/octet-stream", content); a.status != 204 {
		t.Fatalf("write: %d %s", a.status, a.body)
	}
	if a := send(t, "GET", base+at("sub/a"), "", ""); a.status != 200 || a.body != content {
		t.Errorf("read: %d, %d bytes", a.status, len(a.body))
	}
	_, stat := do(t, "GET", base+"/stat"+at("sub/a"), "")
	if info := decode[wire.FileInfo](t, stat); info.Type != "file" || info.Size != int64(len(content)) || info.Mode != "0600" || info.Name != "a" {
		t.Errorf("stat: %s", stat)
	}
	if status, body := do(t, "POST", base+"/mkdir", `{"path":"`+dir+`/sub/deep/er"}`); status != 204 {
		t.Errorf("mkdir: %d %s", status, body)
	}
	if status, body := do(t, "POST", base+"/move", `{"from":"`+dir+`/sub/a","to":"`+dir+`/b"}`); status != 204 {
		t.Errorf("move: %d %s", status, body)
	}
	_, listing := do(t, "GET", base+"/list"+at("")+"&depth=3", "")
	var paths []string
	for _, info := range decode[[]wire.FileInfo](t, listing) {
		rel, err := filepath.Rel(dir, info.Path)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, rel)
	}
	if got := strings.Join(paths, " "); got != "b sub sub/deep sub/deep/er" {
		t.Errorf("list: %s", got)
	}
	if status, body := do(t, "DELETE", base+at("sub"), ""); status < 400 {
		t.Errorf("remove a full directory: %d %s", status, body)
	}
	if status, body := do(t, "DELETE", base+at("sub")+"&recursive=true", ""); status != 204 {
		t.Errorf("remove: %d %s", status, body)
	}
	if status, body := do(t, "GET", base+at("sub"), ""); status != 404 {
		t.Errorf("read what is gone: %d %s", status, body)
	}
}

// TestFileTooLarge sees that a file over the limit leaves nothing behind.
func TestFileTooLarge(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	path := filepath.Join(t.TempDir(), "big")
	req, err := http.NewRequestWithContext(t.Context(), "PUT", base+"/v1/sandboxes/sb-1/files?path="+path, io.LimitReader(zeros{}, 2<<20))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d", resp.StatusCode)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the file is there: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
