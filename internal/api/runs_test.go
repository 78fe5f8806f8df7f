package api_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
)

// ran posts a run that must be answered with 200.
func ran(t *testing.T, url, body string) wire.RunResult {
	t.Helper()
	a := send(t, "POST", url+"/v1/runs", "application/json", body)
	if a.status != http.StatusOK {
		t.Fatalf("%s: %d %s", body, a.status, a.body)
	}
	return decode[wire.RunResult](t, a.body)
}

func TestRun(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, tt := range []struct {
		name, body string
		want       wire.RunResult
	}{
		{"output", `{"args":["echo","hi <&>"]}`, wire.RunResult{Stdout: "hi <&>\n"}},
		{"stderr", `{"args":["warn","oh"]}`, wire.RunResult{Stderr: "oh\n"}},
		{"stdin", `{"args":["cat"],"stdin":"hello"}`, wire.RunResult{Stdout: "hello"}},
		{"binary", `{"args":["cat"],"stdin_base64":"/wA="}`, wire.RunResult{StdoutBase64: []byte("\xff\x00")}},
		{"control", `{"args":["cat"],"stdin":"\u0001\u0002\u0003\u0004"}`, wire.RunResult{StdoutBase64: []byte("\x01\x02\x03\x04")}},
		{"file", `{"args":["cat","/in"],"files":[{"path":"/in","mode":"0600","data_base64":"aGk="}]}`, wire.RunResult{Stdout: "hi"}},
		{"collect", `{"args":["write","/out","hi"],"collect":["/out","/none"]}`, wire.RunResult{
			Files: []wire.RunFile{{Path: "/out", Mode: "0644", Data: []byte("hi")}},
		}},
		{"largest seed", `{"args":["seed"],"seed":18446744073709551615}`, wire.RunResult{Stdout: "18446744073709551615 2025-01-01T00:00:00Z\n", Seed: "18446744073709551615"}},
		{"seed as text", `{"args":["seed"],"seed":"7","start":"2030-01-01T01:00:00+01:00"}`, wire.RunResult{Stdout: "7 2030-01-01T00:00:00Z\n", Seed: "7", Start: "2030-01-01T00:00:00Z"}},
		{"exit code", `{"args":["fail","3"]}`, wire.RunResult{ExitCode: 3}},
		{"signal", `{"args":["die"]}`, wire.RunResult{ExitCode: -11, Signal: "SIGSEGV"}},
		{"time", `{"args":["loop"],"limits":{"virtual_ms":10}}`, wire.RunResult{ExitCode: 124, Signal: "SIGKILL", Failure: "timed out"}},
		{"no command", `{"args":["nope"]}`, wire.RunResult{ExitCode: 127, Failure: "not found"}},
		{"limit", `{"args":["echo","hello"],"limits":{"output_bytes":2}}`, wire.RunResult{Stdout: "he", ExitCode: -9, Signal: "SIGKILL", Failure: "output limit"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := ran(t, url, `{"snapshot":"py",`+tt.body[1:])
			want := tt.want
			if want.Seed == "" {
				want.Seed = "0"
			}
			if want.Start == "" {
				want.Start = "2025-01-01T00:00:00Z"
			}
			if got.ID == "" || got.SnapshotTag != "py" || len(got.Record) == 0 || got.InputHash == got.OutputHash {
				t.Errorf("%+v", got)
			}
			want.ID, want.Digest, want.Mode, want.Snapshot, want.SnapshotTag = got.ID, got.Digest, "deterministic", got.Snapshot, got.SnapshotTag
			want.InputHash, want.OutputHash, want.CanonicalOutputHash, want.Record = got.InputHash, got.OutputHash, got.CanonicalOutputHash, got.Record
			want.VirtualNS, want.WallMS = got.VirtualNS, got.WallMS
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestRunRefused: what cannot be recorded is not run.
func TestRunRefused(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, tt := range []struct {
		body   string
		status int
	}{
		{``, 400},
		{`{"args":["echo"]}`, 400},
		{`{"snapshot":"py"}`, 400},
		{`{"snapshot":"py","args":[]}`, 400},
		{`{"snapshot":"none","args":["echo"]}`, 404},
		{`{"snapshot":"py","args":["echo"],"mode":"odd"}`, 400},
		{`{"snapshot":"py","args":["echo"],"seed":-1}`, 400},
		{`{"snapshot":"py","args":["echo"],"seed":1.5}`, 400},
		{`{"snapshot":"py","args":["echo"],"seed":18446744073709551616}`, 400},
		{`{"snapshot":"py","args":["echo"],"seed":"x"}`, 400},
		{`{"snapshot":"py","args":["echo"],"seed":{}}`, 400},
		{`{"snapshot":"py","args":["echo"],"start":"noon"}`, 400},
		{`{"snapshot":"py","args":["echo"],"start":"1969-01-01T00:00:00Z"}`, 400},
		{`{"snapshot":"py","args":["echo"],"stdin":"a","stdin_base64":"YQ=="}`, 400},
		{`{"snapshot":"py","args":["echo"],"stdin_base64":"?"}`, 400},
		{`{"snapshot":"py","args":["echo"],"cwd":"relative"}`, 400},
		{`{"snapshot":"py","args":["echo\u0000"]}`, 400},
		{`{"snapshot":"py","args":["echo"],"env":{"a=b":"c"}}`, 400},
		{`{"snapshot":"py","args":["echo"],"files":[{"path":"../x"}]}`, 400},
		{`{"snapshot":"py","args":["echo"],"files":[{"path":"/x","mode":"9"}]}`, 400},
		{`{"snapshot":"py","args":["echo"],"collect":["/a/../b"]}`, 400},
		{`{"snapshot":"py","args":["echo"],"collect":["/a","/a"]}`, 400},
		{`{"snapshot":"py","args":["echo"],"limits":{"virtual_ms":9223372036854775807}}`, 400},
		{`{"snapshot":"py","args":["echo"],"limits":{"wall_ms":-1}}`, 400},
		{`{"snapshot":"py","args":["echo"],"limits":{"output_bytes":134217729}}`, 400},
		{`{"snapshot":"py","args":["echo"],"rules":{"streams":["odd"]}}`, 400},
		{`{"snapshot":"py","args":["echo"],"mode":"normal","seed":1}`, 400},
		{`{"snapshot":"py","args":["echo"],"mode":"normal","memory_digest":true}`, 400},
	} {
		// The document does not allow most of these either: ask without its check.
		if a := send(t, "POST", url+"/v1/runs", "application/json", tt.body); a.status != tt.status {
			t.Errorf("%s: %d %s, want %d", tt.body, a.status, a.body, tt.status)
		}
	}
	if page := decode[wire.RecordPage](t, send(t, "GET", url+"/v1/records", "", "").body); len(page.Records) != 0 {
		t.Errorf("there are records of them: %+v", page)
	}
}

// TestRunNormal: an ordinary run of a real process.
func TestRunNormal(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	before := len(b.List())
	got := ran(t, url, `{"snapshot":"py","mode":"normal","args":["sh","-c","cat; echo oh >&2; exit 4"],"stdin":"hello"}`)
	if got.Mode != "normal" || got.Stdout != "hello" || got.Stderr != "oh\n" || got.ExitCode != 4 || got.SnapshotTag != "py" {
		t.Errorf("%+v", got)
	}
	if after := len(b.List()); after != before {
		t.Errorf("%d sandboxes, there were %d", after, before)
	}
}

// TestRunLines: progress, output and result come as lines.
func TestRunLines(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	header := http.Header{"Accept": {"application/x-ndjson"}}
	a := sendWith(t, "POST", url+"/v1/runs", header, `{"snapshot":"py","args":["bytes","200000"]}`)
	var stdout []byte
	var progress int
	var result wire.RunResult
	for line := range strings.Lines(a.body) {
		l := decode[wire.ProgressLine](t, line)
		switch {
		case l.Progress != nil:
			progress++
		case l.Output != nil:
			stdout = append(stdout, l.Output.Base64...)
		default:
			result = decode[wire.RunResult](t, string(l.Result))
		}
	}
	if progress == 0 || !bytes.Equal(stdout, bytes.Repeat([]byte("\xff\x00"), 100000)) || result.ID == "" || result.StdoutBase64 != nil {
		t.Errorf("%d lines of progress, %d bytes, %+v", progress, len(stdout), result)
	}
	a = sendWith(t, "POST", url+"/v1/runs", header, `{"snapshot":"none","args":["echo"]}`)
	if a.status != http.StatusNotFound {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// TestRunDoesNotWait: a client that does not read has its record all the same,
// and all of its output when it reads on.
func TestRunDoesNotWait(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(api.New(apitest.New(t).Config()))
	t.Cleanup(srv.Close)
	const size = 24 << 20 // more than sockets hold
	body := `{"snapshot":"py","args":["bytes","` + strconv.Itoa(size) + `"],"limits":{"output_bytes":` + strconv.Itoa(size) + `}}`
	req, err := http.NewRequestWithContext(t.Context(), "POST", srv.URL+"/v1/runs", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/x-ndjson")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	deadline := time.Now().Add(20 * time.Second)
	for tick := time.Tick(5 * time.Millisecond); ; <-tick {
		page := decode[wire.RecordPage](t, send(t, "GET", srv.URL+"/v1/records", "", "").body)
		if len(page.Records) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("there is no record")
		}
	}
	got, lines := 0, json.NewDecoder(resp.Body)
	for {
		var line wire.ProgressLine
		if err = lines.Decode(&line); err != nil {
			t.Fatalf("after %d bytes: %v", got, err)
		}
		if line.Output != nil {
			got += len(line.Output.Base64)
		}
		if line.Result != nil {
			break
		}
	}
	if got != size {
		t.Errorf("%d bytes, want %d", got, size)
	}
}

// FuzzSeed: a seed is a number of 64 bits, or refused.
func FuzzSeed(f *testing.F) {
	for _, seed := range []string{``, `null`, `7`, `"7"`, `18446744073709551616`, `-1`, `1e3`, `"\u0037"`, `{}`, `"`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		seed, err := api.ParseSeed(raw)
		if err != nil && !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v", raw, err)
		}
		if again, err := api.ParseSeed([]byte(`"` + strconv.FormatUint(seed, 10) + `"`)); err != nil || again != seed {
			t.Errorf("%q: %d, %v", raw, again, err)
		}
	})
}

// FuzzAnchor: what is taken for an anchor is written in one way.
func FuzzAnchor(f *testing.F) {
	f.Add("1:sha256:" + strings.Repeat("0", 64))
	f.Add("01:sha256:" + strings.Repeat("f", 64))
	f.Add("1:2")
	f.Fuzz(func(t *testing.T, text string) {
		anchors, err := api.ParseAnchors([]string{text})
		for seq, digest := range anchors {
			if !strings.HasSuffix(text, ":"+digest) || len(digest) != 71 || seq > 1<<63 {
				t.Errorf("%q: %d %q", text, seq, digest)
			}
		}
		if (err == nil) != (len(anchors) == 1) {
			t.Errorf("%q: %v, %v", text, anchors, err)
		}
	})
}

// TestRunEndsWithClient: nobody is left to want the outcome.
func TestRunEndsWithClient(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	began := make(chan struct{})
	b.Fail = func(op string) error {
		if op == "run" {
			close(began)
		}
		return nil
	}
	ended := make(chan struct{})
	handler := api.New(b.Config())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler.ServeHTTP(w, r)
		close(ended)
	}))
	t.Cleanup(srv.Close)
	ctx, leave := context.WithCancel(t.Context())
	go func() { <-began; leave() }()
	req, err := http.NewRequestWithContext(ctx, "POST", srv.URL+"/v1/runs", strings.NewReader(`{"snapshot":"py","args":["sleep"]}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if resp, err := http.DefaultClient.Do(req); err == nil {
		_ = resp.Body.Close()
		t.Error("it was answered")
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the run goes on")
	}
}

// TestLargeBodies: they are bounded one by one, and all together.
func TestLargeBodies(t *testing.T) {
	t.Parallel()
	cfg := apitest.New(t).Config()
	cfg.MaxBody = 1000
	handler, begun := api.New(cfg), make(chan struct{}, 2)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength < 0 {
			r.Body = &signalling{ReadCloser: r.Body, begun: begun}
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	post := func(length int64, body io.Reader) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), "POST", srv.URL+"/v1/runs", body)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		req.Header.Set("Content-Type", "application/json")
		req.ContentLength = length
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer func() { _ = resp.Body.Close() }()
		text, _ := io.ReadAll(resp.Body) // cut short is short
		return resp.StatusCode, string(text)
	}
	if status, text := post(177<<20, io.LimitReader(zeros{}, 177<<20)); status != http.StatusRequestEntityTooLarge {
		t.Errorf("too large: %d %s", status, text)
	}
	large := `{"snapshot":"py","args":["cat"],"stdin":"` + strings.Repeat("x", 4000) + `"}`
	if status, text := post(int64(len(large)), strings.NewReader(large)); status != http.StatusOK || !strings.Contains(text, strings.Repeat("x", 4000)) {
		t.Errorf("large: %d %s", status, text)
	}
	// Two that are slow keep a third one out, but no small one.
	var slow []*io.PipeWriter
	answers := make(chan int, 2)
	for range 2 {
		r, w := io.Pipe()
		slow = append(slow, w)
		go func() { status, _ := post(-1, r); answers <- status }()
		if _, err := w.Write([]byte(large[:2000])); err != nil {
			t.Fatal(err)
		}
	}
	for range slow {
		<-begun // it has a place
	}
	if status, text := post(int64(len(large)), strings.NewReader(large)); status != http.StatusTooManyRequests {
		t.Errorf("a third large one: %d %s", status, text)
	}
	small := `{"snapshot":"py","args":["echo"]}`
	if status, text := post(int64(len(small)), strings.NewReader(small)); status != http.StatusOK {
		t.Errorf("a small one: %d %s", status, text)
	}
	for _, w := range slow {
		_, err := w.Write([]byte(large[2000:]))
		if err = errors.Join(err, w.Close()); err != nil {
			t.Error(err)
		}
	}
	for range slow {
		if status := <-answers; status != http.StatusOK {
			t.Errorf("a slow one: %d", status)
		}
	}
}

// signalling is a body that tells when it is read.
type signalling struct {
	io.ReadCloser
	once  sync.Once
	begun chan struct{}
}

func (s *signalling) Read(p []byte) (int, error) {
	s.once.Do(func() { s.begun <- struct{}{} })
	return s.ReadCloser.Read(p)
}

func TestRecords(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	var ids []string
	for i := range 3 {
		ids = append(ids, ran(t, url, `{"snapshot":"py","args":["echo","`+strconv.Itoa(i)+`"],"memory_digest":true}`).ID)
	}
	list := func(query string) (found []string, next int64) {
		t.Helper()
		a := send(t, "GET", url+"/v1/records?"+query, "", "")
		if a.status != http.StatusOK {
			t.Fatalf("%s: %d %s", query, a.status, a.body)
		}
		page := decode[wire.RecordPage](t, a.body)
		for _, r := range page.Records {
			found = append(found, r.ID)
		}
		return found, page.NextBefore
	}
	got, next := list("limit=2")
	if !slices.Equal(got, []string{ids[2], ids[1]}) || next != 2 {
		t.Errorf("%v, %d; want the last two of %v", got, next, ids)
	}
	if got, next = list("limit=2&before=2"); !slices.Equal(got, ids[:1]) || next != 0 {
		t.Errorf("%v, %d", got, next)
	}
	for query, want := range map[string]int{
		"mode=deterministic": 3, "mode=normal": 0, "user=local": 3, "user=x": 0, "block=x": 0, "snapshot=none": 0, "since=2001-01-01T00:00:00Z": 3, "since=2200-01-01T00:00:00Z": 0,
	} {
		if got, _ := list(query); len(got) != want {
			t.Errorf("%s: %v, want %d", query, got, want)
		}
	}
	for _, bad := range []string{"limit=1001", "limit=-1", "before=-1", "before=x", "mode=odd", "since=noon"} {
		if status, body := do(t, "GET", url+"/v1/records?"+bad, ""); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", bad, status, body)
		}
	}
	one := decode[wire.Record](t, send(t, "GET", url+"/v1/records/"+ids[1][:8], "", "").body)
	if one.ID != ids[1] || one.Seq != 2 || !slices.Equal(one.Args, []string{"echo", "1"}) || len(one.Envelope) == 0 || one.MemoryDigest == "" || one.Seed != "0" {
		t.Errorf("%+v", one)
	}
	for path, want := range map[string]int{"ffffffff-0000": 404, "x": 400, "../x": 404, "%2e%2e": 400, ids[0] + "/bundle/x": 404, "ffff/bundle": 404} {
		if status, body := do(t, "GET", url+"/v1/records/"+path, ""); status != want {
			t.Errorf("%s: %d %s, want %d", path, status, body, want)
		}
	}
	check := decode[wire.RecordCheck](t, send(t, "GET", url+"/v1/records/check?contents=true&anchor=2:"+one.Digest, "", "").body)
	if !check.OK || check.Records != 3 || check.LastSeq != 3 {
		t.Errorf("%+v", check)
	}
	if check = decode[wire.RecordCheck](t, send(t, "GET", url+"/v1/records/check?anchor=1:"+one.Digest, "", "").body); check.OK || check.Problems[0].Seq != 1 {
		t.Errorf("another anchor: %+v", check)
	}
	for _, bad := range []string{"1", "x:sha256:" + strings.Repeat("0", 64), "1:" + strings.Repeat("0", 64), "1:sha256:00"} {
		if status, body := do(t, "GET", url+"/v1/records/check?anchor="+bad, ""); status != http.StatusBadRequest {
			t.Errorf("anchor %s: %d %s", bad, status, body)
		}
	}
}

// verified posts a verification that must be answered with 200.
func verified(t *testing.T, url, body string) wire.VerifyReport {
	t.Helper()
	a := send(t, "POST", url+"/v1/verify", "application/json", body)
	if a.status != http.StatusOK {
		t.Fatalf("%.200s: %d %s", body, a.status, a.body)
	}
	return decode[wire.VerifyReport](t, a.body)
}

func TestVerify(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	same := ran(t, url, `{"snapshot":"py","args":["cat"],"stdin":"hello"}`)
	rep := verified(t, url, `{"id":"`+same.ID[:8]+`","runs":3}`)
	if rep.Result != "verified" || rep.Agreed != 3 || rep.Chain != "linked" || rep.ID != same.ID {
		t.Errorf("%+v", rep)
	}
	drifts := ran(t, url, `{"snapshot":"py","args":["drift"]}`)
	rep = verified(t, url, `{"id":"`+drifts.ID+`"}`)
	if rep.Result != "mismatch" || len(rep.Verdict.Differences) == 0 || *rep.Verdict.Differences[0].Offset != 13 || rep.Verdict.Differences[0].Line != 2 {
		t.Errorf("%+v", rep)
	}
	data := send(t, "GET", url+"/v1/records/"+same.ID+"/bundle", "", "").body
	rep = verified(t, url, `{"bundle_base64":"`+base64.StdEncoding.EncodeToString([]byte(data))+`"}`)
	if rep.Result != "verified" || rep.Chain != "linked" {
		t.Errorf("bundle: %+v", rep)
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, same.Record, "", "  "); err != nil {
		t.Fatal(err)
	}
	if rep = verified(t, url, `{"envelope":`+pretty.String()+`}`); rep.Result != "verified" {
		t.Errorf("envelope: %+v", rep)
	}
	if rep = verified(t, url, `{"envelope":{"a":1}}`); rep.Result != "mismatch" || rep.Findings[0].Kind != "malformed" {
		t.Errorf("no record: %+v", rep)
	}
	if rep = verified(t, url, `{"id":"`+same.ID+`","offline":true}`); rep.Result != "cannot compare" || len(rep.Findings) != 0 || rep.Runs != 0 {
		t.Errorf("offline: %+v", rep)
	}
	for body, want := range map[string]int{
		`{}`: 400, `{"id":"` + same.ID + `","envelope":{}}`: 400, `{"id":"ffffffff"}`: 404, `{"id":"x"}`: 400,
		`{"id":"` + same.ID + `","runs":1001}`: 400, `{"id":"` + same.ID + `","keys":["no key"]}`: 400,
	} {
		if status, text := do(t, "POST", url+"/v1/verify", body); status != want {
			t.Errorf("%s: %d %s, want %d", body, status, text, want)
		}
	}
	damage(t, b)
	if rep = verified(t, url, `{"id":"`+same.ID+`"}`); rep.Result != "mismatch" {
		t.Errorf("damaged: %+v", rep)
	}
	if check := decode[wire.RecordCheck](t, send(t, "GET", url+"/v1/records/check?contents=true", "", "").body); check.OK {
		t.Errorf("damaged: %+v", check)
	}
}

// damage changes a byte of every content.
func damage(t *testing.T, b *apitest.Backend) {
	t.Helper()
	blobs, err := filepath.Glob(filepath.Join(b.Records(), "blobs", "*", "*"))
	if err != nil || len(blobs) == 0 {
		t.Fatal(blobs, err)
	}
	for _, path := range blobs {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[0] ^= 1
		if err = os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBundleCutShort: a bundle that is not whole does not pass for one.
func TestBundleCutShort(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	srv := httptest.NewServer(api.New(b.Config())) // what checks answers would hide the cut
	t.Cleanup(srv.Close)
	url := srv.URL
	id := ran(t, url, `{"snapshot":"py","args":["bytes","2000000"]}`).ID
	read := func() (int, error) {
		resp, err := http.Get(url + "/v1/records/" + id + "/bundle")
		if err != nil {
			return 0, err
		}
		defer func() { _ = resp.Body.Close() }()
		entries := 0
		for r := tar.NewReader(resp.Body); ; entries++ {
			if _, err := r.Next(); errors.Is(err, io.EOF) {
				return entries, nil
			} else if err != nil {
				return entries, err
			}
		}
	}
	if n, err := read(); n != 3 || err != nil {
		t.Errorf("%d entries, %v", n, err)
	}
	damage(t, b)
	if n, err := read(); err == nil {
		t.Errorf("damaged: %d entries and no error", n)
	}
}

// TestRecordsAreOwn: a token of scope fork sees the records of its own runs,
// scope read all of them but no commands.
func TestRecordsAreOwn(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	run := func(who string) string {
		t.Helper()
		a := g.do(t, who, "POST", "/v1/runs", `{"snapshot":"py","args":["echo","s3cret"]}`)
		if a.status != http.StatusOK {
			t.Fatalf("%d %s", a.status, a.body)
		}
		return decode[wire.RunResult](t, a.body).ID
	}
	mine, theirs := run("fork"), run("few")
	for _, tt := range []struct {
		who, method, path, body string
		status                  int
	}{
		{"read", "POST", "/v1/runs", `{"snapshot":"py","args":["echo"]}`, 403},
		{"read", "POST", "/v1/verify", `{"id":"` + mine + `"}`, 403},
		{"read", "GET", "/v1/records/" + mine, "", 200},
		{"read", "GET", "/v1/records/" + mine + "/bundle", "", 403},
		{"read", "GET", "/v1/records/key", "", 200},
		{"read", "GET", "/v1/records/check", "", 200},
		{"read", "GET", "/v1/records/check?contents=true", "", 403},
		{"fork", "GET", "/v1/records/" + mine, "", 200},
		{"fork", "GET", "/v1/records/" + theirs, "", 404},
		{"fork", "GET", "/v1/records/" + theirs + "/bundle", "", 404},
		{"fork", "POST", "/v1/verify", `{"id":"` + theirs + `"}`, 404},
		{"fork", "POST", "/v1/verify", `{"id":"` + mine + `"}`, 200},
		{"fork", "POST", "/v1/verify", `{"id":"` + mine + `","believe":true}`, 403},
		{"admin", "POST", "/v1/verify", `{"id":"` + mine + `","believe":true}`, 200},
	} {
		a := g.do(t, tt.who, tt.method, tt.path, tt.body)
		if a.status != tt.status {
			t.Errorf("%s: %s %s %s: %d %s, want %d", tt.who, tt.method, tt.path, tt.body, a.status, a.body, tt.status)
		}
		if tt.who == "read" && strings.Contains(a.body, "s3cret") {
			t.Errorf("%s is told what was run: %s", tt.who, a.body)
		}
	}
	for who, want := range map[string]int{"fork": 1, "few": 1, "read": 2, "admin": 2} {
		a := g.do(t, who, "GET", "/v1/records", "")
		if got := decode[wire.RecordPage](t, a.body).Records; len(got) != want {
			t.Errorf("%s sees %d records: %s", who, len(got), a.body)
		}
	}
	if a := g.do(t, "fork", "GET", "/v1/records?user=few", ""); strings.Contains(a.body, theirs) {
		t.Errorf("fork sees %s", a.body)
	}
}

// TestRunsAreBounded: the bound of a token's sandboxes is that of its machines.
func TestRunsAreBounded(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	a := g.do(t, "few", "POST", "/v1/runs", `{"snapshot":"py","args":["echo"]}`)
	g.expect(t, a, 200, "")
	id := decode[wire.RunResult](t, a.body).ID
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`), 201, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/verify", `{"id":"`+id+`"}`), 200, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/verify", `{"id":"`+id+`","runs":2}`), 429, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`), 201, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/runs", `{"snapshot":"py","args":["echo"]}`), 429, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/verify", `{"id":"`+id+`","offline":true}`), 200, "")
}

// TestRunAudited: a run is an act, and so is taking a record's contents away.
func TestRunAudited(t *testing.T) {
	t.Parallel()
	url, end := audited(t, false)
	id := ran(t, url, `{"snapshot":"py","args":["echo","s3cret"]}`).ID
	verified(t, url, `{"id":"`+id+`"}`)
	send(t, "GET", url+"/v1/records/"+id+"/bundle", "", "")
	send(t, "GET", url+"/v1/records/"+id, "", "")
	want := []string{
		"intent run.create local 0", "outcome run.create local 200 ok " + id,
		"intent record.verify local 0", "outcome record.verify local 200 ok " + id,
		"intent record.export " + id + " local 0", "outcome record.export " + id + " local 200 ok",
	}
	if diff := cmp.Diff(want, briefs(end())); diff != "" {
		t.Error(diff)
	}
}

func TestRunsCounted(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	id := ran(t, url, `{"snapshot":"py","args":["loop"]}`).ID
	verified(t, url, `{"id":"`+id+`"}`)
	send(t, "POST", url+"/v1/runs", "application/json", `{"snapshot":"py","args":["x"],"mode":"made-up"}`)
	text := send(t, "GET", url+"/metrics", "", "").body
	for _, want := range []string{
		`tine_runs_total{mode="deterministic",outcome="timed_out"} 1`, `tine_verifications_total{result="verified"} 1`, `tine_runs_total{mode="other",outcome="error"} 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %s", want)
		}
	}
}

// TestNoAttestor: a daemon that keeps no records says so.
func TestNoAttestor(t *testing.T) {
	t.Parallel()
	url := limited(t, func(c *api.Config) { c.Attestor = nil })
	for _, path := range []string{"GET /v1/records", "GET /v1/records/abcd", "GET /v1/records/key", "GET /v1/records/check", "GET /v1/records/abcd/bundle", "POST /v1/runs", "POST /v1/verify"} {
		method, route, _ := strings.Cut(path, " ")
		if status, body := do(t, method, url+route, ""); status != http.StatusNotImplemented {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
}
