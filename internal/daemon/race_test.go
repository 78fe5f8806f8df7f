//go:build race

package daemon

// manyConnections is less than the 8,128 goroutines that the race detector
// bears.
const manyConnections = 3_000
