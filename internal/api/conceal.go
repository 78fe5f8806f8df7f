package api

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/tinevm/tine/internal/wire"
)

// concealer takes out of a text what only somebody on this host may learn.
type concealer struct{ state *strings.Replacer }

type concealKey struct{}

// newConcealer is for a state directory, under the name that it has and the one
// that its links lead to.
func newConcealer(stateDir string) *concealer {
	const name = "<state>"
	if stateDir == "" {
		return &concealer{strings.NewReplacer()}
	}
	pairs := []string{stateDir, name}
	if real, err := filepath.EvalSymlinks(stateDir); err == nil && real != stateDir { // else it has one name
		pairs = append(pairs, real, name)
	}
	return &concealer{strings.NewReplacer(pairs...)}
}

// screen marks requests that come over the network: what they are told of
// errors has no paths of this host. Who can open the unix socket sees them.
func (c *concealer) screen(r *http.Request) *http.Request {
	addr, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok || !strings.HasPrefix(addr.Network(), "tcp") {
		return r
	}
	return r.WithContext(context.WithValue(r.Context(), concealKey{}, c))
}

// hostPath is an absolute path in a text.
var hostPath = regexp.MustCompile(`(^|[\s"'(=:])/[^\s"'():,;]+`)

// conceal is text as whoever made ctx's request may see it.
func conceal(ctx context.Context, text string) string {
	if c, ok := ctx.Value(concealKey{}).(*concealer); ok {
		return c.state.Replace(text)
	}
	return text
}

// answerTo is answerFor, as whoever made ctx's request may see it. Of an error
// that nobody foresaw all paths are hidden: they are in the log.
func answerTo(ctx context.Context, err error) (int, wire.Error) {
	status, body := answerFor(err)
	if _, screened := ctx.Value(concealKey{}).(*concealer); !screened {
		return status, body
	}
	body.Error, body.Hint = conceal(ctx, body.Error), conceal(ctx, body.Hint)
	if status == http.StatusInternalServerError {
		body.Error = hostPath.ReplaceAllString(body.Error, "${1}<path>")
	}
	return status, body
}
