package api_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/wire"
)

// TestPages goes through a list page by page, and sees that the pages are the
// list.
func TestPages(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for i := range 4 {
		do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py"}`)
		do(t, "POST", url+"/v1/snapshots", fmt.Sprintf(`{"tag":"s%d","image":"py"}`, i))
		do(t, "POST", url+"/v1/images", fmt.Sprintf(`{"name":"i%d","source":"debian:bookworm"}`, i))
		do(t, "POST", url+"/v1/workspaces", fmt.Sprintf(`{"name":"w%d","snapshot_tag":"py"}`, i))
	}
	for path, field := range map[string]string{
		"/v1/sandboxes": "id", "/v1/snapshots": "tag", "/v1/images": "name", "/v1/workspaces": "name",
	} {
		t.Run(field+"_of_"+strings.TrimPrefix(path, "/v1/"), func(t *testing.T) {
			t.Parallel()
			names := func(body string) []string {
				var out []string
				for _, item := range decode[[]map[string]any](t, body) {
					out = append(out, fmt.Sprint(item[field]))
				}
				return out
			}
			_, whole := do(t, "GET", url+path+"?limit=1000", "")
			var pages []string
			next := path + "?limit=2"
			for n := 0; next != ""; n++ {
				a := send(t, "GET", url+next, "", "")
				part := names(a.body)
				if len(part) > 2 || a.status != http.StatusOK || n > 9 {
					t.Fatalf("page %d: %d %s", n, a.status, a.body)
				}
				pages = append(pages, part...)
				next, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
				if (next == "") != (a.header.Get("X-Next-After") == "") {
					t.Errorf("Link %q, X-Next-After %q", a.header.Get("Link"), a.header.Get("X-Next-After"))
				}
			}
			if diff := cmp.Diff(names(whole), pages); diff != "" || len(pages) < 4 {
				t.Errorf("the whole and its pages (-want +got):\n%s", diff)
			}
			if a := send(t, "GET", url+path, "", ""); len(names(a.body)) != len(pages) || a.header.Get("Link") != "" {
				t.Errorf("without a limit: %s", a.body)
			}
		})
	}
}

func TestPageAfterName(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for range 2 {
		do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py"}`)
	}
	_, body := do(t, "GET", url+"/v1/sandboxes?after=sb-1", "")
	if boxes := decode[[]wire.Sandbox](t, body); len(boxes) != 2 || boxes[0].ID != "sb-2" {
		t.Errorf("after sb-1: %s", body)
	}
	a := send(t, "GET", url+"/v1/sandboxes?limit=2", "", "")
	do(t, "DELETE", url+"/v1/sandboxes/sb-2", "") // the next page does not need it
	_, body = do(t, "GET", url+"/v1/sandboxes?after="+a.header.Get("X-Next-After"), "")
	if boxes := decode[[]wire.Sandbox](t, body); len(boxes) != 1 || boxes[0].ID != "sb-3" {
		t.Errorf("after one that is gone: %s", body)
	}
	for _, query := range []string{"limit=0", "limit=-1", "limit=1001", "limit=x", "after=sb-99"} {
		if status, body := do(t, "GET", url+"/v1/sandboxes?"+query, ""); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", query, status, body)
		}
	}
}

// TestTimes sees that times for readers are those for programs.
func TestTimes(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	_, body := do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py","lifetime_secs":60}`)
	box := decode[[]wire.Sandbox](t, body)[0]
	_, body = do(t, "GET", url+"/v1/snapshots/py/info", "")
	snap := decode[wire.SnapshotDetail](t, body)
	for _, tt := range []struct {
		text string
		unix int64
	}{
		{box.CreatedAt, box.CreatedAtUnix},
		{box.LastActiveAt, box.LastActiveUnix},
		{box.ExpiresAt, box.ExpiresAtUnix},
		{snap.CreatedAt, snap.CreatedAtUnix},
	} {
		if got := parseTime(t, tt.text).Unix(); got != tt.unix {
			t.Errorf("%q is %d, want %d", tt.text, got, tt.unix)
		}
	}
}
