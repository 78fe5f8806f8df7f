package client_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

func TestNet(t *testing.T) {
	t.Parallel()
	c, _ := connect(t)
	_, err := c.CreateSnapshot(t.Context(), client.CreateSnapshotRequest{Tag: "net", Image: "py", Net: true, NetAllow: client.EgressRules("example.com")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	secret := client.EgressSecret{Name: "api", Header: "Authorization", Value: "s3same", Hosts: []string{"api.example.com"}}
	boxes, err := c.Fork(t.Context(), client.ForkRequest{Snapshot: "net", CPULimit: 0.5, PIDsLimit: 64, IOLimitBytes: 4096, Net: &client.Net{
		Allow: []string{"api.example.com"}, Inspect: true, UpBytesPerSecond: 1 << 20, Secrets: []client.EgressSecret{secret},
	}})
	if err != nil {
		t.Fatal(err)
	}
	id := boxes[0].ID
	if l := boxes[0].Limits; l == nil || l.CPUMillis != 500 || l.PIDs != 64 || l.IOBytes != 4096 {
		t.Errorf("limits %+v", l)
	}
	expect := func(n client.SandboxNet, err error, want ...string) {
		t.Helper()
		if diff := cmp.Diff(append([]string{}, want...), n.Allow); err != nil || diff != "" || len(n.Secrets) != 1 {
			t.Errorf("%v, %+v: %s", err, n, diff)
		}
	}
	n, err := c.Net(t.Context(), id)
	expect(n, err, "api.example.com")
	n, err = c.ChangeNet(t.Context(), id, client.NetChange{Allow: []string{"a.example", "b.example"}, Remove: []string{"api.example.com"}})
	expect(n, err, "a.example", "b.example")
	no := false
	n, err = c.SetNet(t.Context(), id, nil, &no)
	expect(n, err)
	if rows, listErr := c.Nets(t.Context()); listErr != nil || len(rows) != 1 || rows[0].ID != id || rows[0].Inspect {
		t.Errorf("%+v, %v", rows, listErr)
	}
	if _, err = c.CollectNets(t.Context()); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("collect: %v", err)
	}
	if text := fmt.Sprintf("%v %+v %#v %s", secret, secret, secret, &secret); strings.Contains(text, "s3same") {
		t.Errorf("printed: %s", text)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	c, _ := connect(t)
	boxes, err := c.Fork(t.Context(), client.ForkRequest{Snapshot: "py"})
	if err != nil {
		t.Fatal(err)
	}
	cpus := 0.25
	box, err := c.Limit(t.Context(), boxes[0].ID, client.LimitChange{CPUs: &cpus})
	if err != nil || box.Limits.CPUMillis != 250 || box.Limits.MemoryMiB != boxes[0].Limits.MemoryMiB {
		t.Errorf("%+v, %v", box.Limits, err)
	}
	if u, usageErr := c.Usage(t.Context(), boxes[0].ID); usageErr != nil || u.PIDs == 0 || u.CPUSecs == 0 {
		t.Errorf("%+v, %v", u, usageErr)
	}
	if _, err = c.Limit(t.Context(), boxes[0].ID, client.LimitChange{}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("nothing to change: %v", err)
	}
}
