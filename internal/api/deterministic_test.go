package api_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/wire"
)

func TestDeterministicSnapshot(t *testing.T) {
	t.Parallel()
	srv, b := server(t)
	status, body := do(t, "POST", srv+"/v1/snapshots", `{"tag":"same","image":"py","deterministic":true,"clock_shift":0,"warmup":["true"]}`)
	snap := decode[wire.Snapshot](t, body)
	if status != 201 || !snap.Deterministic || snap.ClockShift != 0 || snap.Bootable || snap.Status != "ready" || snap.MemoryMiB != 1 {
		t.Errorf("%d %s", status, body)
	}
	if status, body = do(t, "POST", srv+"/v1/snapshots", `{"tag":"same","image":"py","deterministic":true}`); status != 400 || !strings.Contains(body, "exists") {
		t.Errorf("%d %s", status, body)
	}
	_, body = do(t, "POST", srv+"/v1/snapshots", `{"tag":"same","image":"py","deterministic":true,"clock_shift":4,"replace":true}`)
	if snap = decode[wire.Snapshot](t, body); snap.ClockShift != 4 {
		t.Errorf("%s", body)
	}
	_, body = do(t, "GET", srv+"/v1/snapshots/same/info", "")
	if d := decode[wire.SnapshotDetail](t, body); !d.Deterministic || d.ClockShift != 4 || d.TwinOf != "" {
		t.Errorf("%s", body)
	}
	_, body = do(t, "GET", srv+"/v1/tree", "")
	for _, n := range decode[wire.Tree](t, body).Nodes {
		if n.Deterministic != (n.Tag == "same") {
			t.Errorf("%+v", n)
		}
	}
	for _, bad := range []string{
		`{"tag":"x","image":"py","clock_shift":2}`, `{"tag":"x","image":"py","deterministic":true,"clock_shift":11}`,
		`{"tag":"x","image":"py","deterministic":true,"clock_shift":-1}`, `{"tag":"x","image":"py","deterministic":true,"vcpus":2}`,
		`{"tag":"x","image":"py","deterministic":true,"net":true}`, `{"tag":"x","image":"py","net":1}`,
		`{"tag":"x","image":"py","deterministic":true,"disk_mib":64}`, `{"tag":"x","image":"py","deterministic":"yes"}`,
	} {
		if status, body = do(t, "POST", srv+"/v1/snapshots", bad); status != 400 {
			t.Errorf("%s: %d %s", bad, status, body)
		}
	}
	// A tag that has warm forks is not taken from them.
	do(t, "PUT", srv+"/v1/snapshots/py/pool", `{"size":2}`)
	if status, body = do(t, "POST", srv+"/v1/snapshots", `{"tag":"py","image":"py","deterministic":true,"replace":true}`); status != 409 {
		t.Errorf("%d %s", status, body)
	}
	status, body = do(t, "POST", srv+"/v1/snapshots/same/verify", "")
	v := decode[wire.SnapshotVerification](t, body)
	if status != 200 || v.Result != "verified" || v.Memory == nil || !v.Memory.Same || !v.Device.Same || v.Digest != snap.Digest {
		t.Errorf("%d %s", status, body)
	}
	_, body = do(t, "POST", srv+"/v1/snapshots/py/verify", "")
	if v = decode[wire.SnapshotVerification](t, body); v.Result != "cannot compare" || len(v.Missing) != 1 || v.Memory != nil {
		t.Errorf("%s", body)
	}
	if status, body = do(t, "POST", srv+"/v1/snapshots/none/verify", ""); status != 404 {
		t.Errorf("%d %s", status, body)
	}
	b.Fail = func(op string) error {
		if op == "remake" {
			return errors.New("another")
		}
		return nil
	}
	_, body = do(t, "POST", srv+"/v1/snapshots/same/verify", "")
	if v = decode[wire.SnapshotVerification](t, body); v.Result != "mismatch" || v.Memory.Same || v.Memory.Was == v.Memory.Is || !v.Device.Same {
		t.Errorf("%s", body)
	}
}

// TestTwinMarked: a snapshot that was made because of another says of which.
func TestTwinMarked(t *testing.T) {
	t.Parallel()
	srv, _ := server(t)
	_, body := do(t, "GET", srv+"/v1/snapshots/py/info", "")
	tag := deterministic.TwinTag(decode[wire.SnapshotDetail](t, body).Digest)
	do(t, "POST", srv+"/v1/snapshots", `{"tag":"`+tag+`","image":"py","deterministic":true}`)
	twin := func() string {
		_, body = do(t, "GET", srv+"/v1/snapshots/"+tag+"/info", "")
		return decode[wire.SnapshotDetail](t, body).TwinOf
	}
	if got := twin(); got != "py" {
		t.Errorf("twin of %q", got)
	}
	_, body = do(t, "GET", srv+"/v1/tree", "")
	if !strings.Contains(body, `"twin_of":"py"`) {
		t.Errorf("%s", body)
	}
	do(t, "DELETE", srv+"/v1/sandboxes/sb-1", "")
	do(t, "DELETE", srv+"/v1/snapshots/py", "")
	if got := twin(); got != deterministic.TwinSource(tag) || !strings.HasPrefix(got, "sha256:") {
		t.Errorf("twin of %q", got)
	}
	if deterministic.TwinSource("twin-peaks") != "" || deterministic.TwinSource("py") != "" {
		t.Error("that is no twin's tag")
	}
}
