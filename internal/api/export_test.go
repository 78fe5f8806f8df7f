package api

import (
	"io"

	"github.com/tinevm/tine/internal/auth"
)

// ScopeIncludes reports whether a scope is enough for a route.
func ScopeIncludes(pattern string, scope auth.Scope) bool { return scope.Includes(scopeOf(pattern)) }

// ActionOf is actionOf.
var ActionOf = actionOf

// ParseSeed is parseSeed.
func ParseSeed(raw []byte) (uint64, error) { return parseSeed(raw) }

// ParseAnchors is parseAnchors.
func ParseAnchors(texts []string) (map[uint64]string, error) { return parseAnchors(texts) }

// Withheld is a body whose last byte is withheld.
func Withheld(body io.Reader) io.Reader { return &withheld{ReadCloser: io.NopCloser(body)} }

// ParseTarget is parseTarget, for a path that isProxied; others are not ok. Owned
// is the sandbox whose owner is asked for.
func ParseTarget(escaped string) (id, prefix, path, owned string, port int, ok bool) {
	if !isProxied(escaped) {
		return
	}
	t, err := parseTarget(escaped)
	return t.id, t.prefix, t.path, objectIn(proxyPattern, escaped), t.port, err == nil
}
