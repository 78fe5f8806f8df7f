// Package wire is api/openapi.yaml in Go: the types that requests and answers
// carry, and the server's routes. All of it is generated but this comment and the
// forms of egress rules, of which there are two.
package wire
