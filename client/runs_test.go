package client_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// TestRun goes through all that there is about a record.
func TestRun(t *testing.T) {
	t.Parallel()
	c, _ := connect(t)
	ctx := t.Context()
	var stdout, stderr bytes.Buffer
	var news int
	req := client.RunRequest{
		Snapshot: "py", Args: []string{"cat", "/in"}, Env: map[string]string{"A": "b"}, Dir: "/srv", Stdin: []byte("\xff"),
		Files: []client.RunFile{{Path: "/in", Mode: 0o755, Data: []byte("\xfe")}}, Collect: []string{"/out"},
		Seed: 1<<64 - 1, Start: time.Date(2030, 1, 2, 3, 4, 5, 6, time.UTC),
		Limits: client.RunLimits{Virtual: time.Second, Wall: time.Minute, Output: 100}, StreamRules: []string{"timestamps"}, MemoryDigest: true,
		Stdout: &stdout, Stderr: &stderr, Report: func(client.Progress) { news++ },
	}
	result, err := c.Run(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	if stdout.String() != "\xff\xfe" || stderr.Len() > 0 || news == 0 || result.StdoutBase64 != nil || result.Seed != "18446744073709551615" ||
		result.Start != "2030-01-02T03:04:05.000000006Z" || result.MemoryDigest == "" {
		t.Errorf("%+v, stdout %q, stderr %q, %d pieces of news", result, stdout.String(), stderr.String(), news)
	}
	req.Stdout, req.Stderr = nil, nil
	again, err := c.Run(ctx, req)
	if err != nil || !bytes.Equal(again.StdoutBase64, []byte("\xff\xfe")) || again.InputHash != result.InputHash || again.OutputHash != result.OutputHash {
		t.Errorf("%+v, %v", again, err)
	}
	page, err := c.Records(ctx, client.RecordFilter{Limit: 1, Mode: client.RunDeterministic, User: "local", Snapshot: "py", Since: time.Now().Add(-time.Hour)})
	if err != nil || len(page.Records) != 1 || page.Records[0].ID != again.ID || page.NextBefore != 2 {
		t.Errorf("%+v, %v", page, err)
	}
	if page, err = c.Records(ctx, client.RecordFilter{Before: page.NextBefore}); err != nil || len(page.Records) != 1 || page.Records[0].ID != result.ID {
		t.Errorf("%+v, %v", page, err)
	}
	one, err := c.Record(ctx, result.ID[:8])
	if err != nil || one.Digest != result.Digest || !bytes.Equal(one.Envelope, result.Record) {
		t.Errorf("%+v, %v", one, err)
	}
	key, err := c.RecordKey(ctx)
	if err != nil || key.ID != one.KeyID {
		t.Errorf("%+v, %v", key, err)
	}
	check, err := c.CheckRecords(ctx, true, "1:"+result.Digest)
	if err != nil || !check.OK || check.Records != 2 {
		t.Errorf("%+v, %v", check, err)
	}
	bundle, err := c.RecordBundle(ctx, result.ID)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(bundle)
	if err = errors.Join(err, bundle.Close()); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]client.VerifyRequest{
		"id": {ID: result.ID, Runs: 2}, "bundle": {Bundle: data, Keys: []string{key.Pem}}, "envelope": {Envelope: one.Envelope},
	} {
		if rep, verr := c.Verify(ctx, v, func(client.Progress) {}); verr != nil || rep.Result != client.Verified {
			t.Errorf("%s: %+v, %v", name, rep, verr)
		}
	}
	if _, err = c.Record(ctx, "ffffffff"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no such record: %v", err)
	}
}

// TestRunFails: what goes wrong on the way is an error.
func TestRunFails(t *testing.T) {
	t.Parallel()
	c, _ := connect(t)
	full := writerFunc(func([]byte) (int, error) { return 0, io.ErrShortWrite })
	req := client.RunRequest{Snapshot: "py", Args: []string{"echo", strings.Repeat("x", 1000)}, Stdout: full}
	if _, err := c.Run(t.Context(), req); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("a writer that fails: %v", err)
	}
	req.Snapshot = "none"
	if _, err := c.Run(t.Context(), req); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no snapshot: %v", err)
	}
	req.Snapshot, req.Mode = "py", "odd"
	if _, err := c.Run(t.Context(), req); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a mode that there is not: %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
