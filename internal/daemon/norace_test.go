//go:build !race

package daemon

const manyConnections = 10_000
