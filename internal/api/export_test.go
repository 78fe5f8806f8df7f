package api

import "github.com/tinevm/tine/internal/auth"

// ScopeIncludes reports whether a scope is enough for a route.
func ScopeIncludes(pattern string, scope auth.Scope) bool { return scope.Includes(scopeOf(pattern)) }
