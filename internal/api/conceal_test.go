package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

func TestConceal(t *testing.T) {
	t.Parallel()
	real := filepath.Join(t.TempDir(), "real")
	link := filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.Mkdir(real, 0o700), os.Symlink(real, link)); err != nil {
		t.Fatal(err)
	}
	c := newConcealer(link)
	from := func(addr net.Addr) context.Context {
		r, err := http.NewRequestWithContext(context.WithValue(t.Context(), http.LocalAddrContextKey, addr), "GET", "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.screen(r).Context()
	}
	far, near := from(&net.TCPAddr{}), from(&net.UnixAddr{Net: "unix"})
	for name, tt := range map[string]struct {
		err        error
		want, hint string
	}{
		"state": {
			errdef.WithHint(fmt.Errorf("%w: open %s/snapshots/x: no", errdef.ErrUnavailable, link), "rm "+real+"/y"),
			"unavailable: open <state>/snapshots/x: no", "rm <state>/y",
		},
		"of-a-guest": {fmt.Errorf("%w: open /root/x: no", errdef.ErrNotFound), "not found: open /root/x: no", ""},
		"unforeseen": {errors.New(`fork/exec /usr/bin/qemu: "/etc/x" =/a (/b), see http://c/d`), `fork/exec <path>: "<path>" =<path> (<path>), see http:<path>`, ""},
		"plain":      {errors.New("a/b and 1/2"), "a/b and 1/2", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, body := answerTo(far, tt.err); body.Error != tt.want || body.Hint != tt.hint {
				t.Errorf("over TCP: %q, hint %q, want %q, hint %q", body.Error, body.Hint, tt.want, tt.hint)
			}
			if _, body := answerTo(near, tt.err); body.Error != tt.err.Error() || body.Hint != errdef.Hint(tt.err) {
				t.Errorf("over the socket: %q, hint %q", body.Error, body.Hint)
			}
		})
	}
	if text := newConcealer("").state.Replace("/x"); text != "/x" {
		t.Errorf("without a state directory: %q", text)
	}
	if !strings.Contains(conceal(near, real), real) {
		t.Error("the socket's caller does not see paths")
	}
}
