// Package wire is api/openapi.yaml in Go: the types that requests and answers
// carry, and the server's routes. All of it but this comment is generated.
package wire
