package main

// planFile is where the outer guest finds its plan.
const planFile = "/plan.json"

// The names of the ports that the outer guest speaks through: the tests' own
// words, and at the end one JSON value, the result.
const (
	outputPort = "kvmtest.output"
	resultPort = "kvmtest.result"
)

// plan is what an outer guest is to run: the tests of one program.
type plan struct {
	// Nonce is in the result, so that nothing else is taken for it.
	Nonce string `json:"nonce"`
	// Program and Dir are paths in the guest.
	Program string `json:"program"`
	Dir     string `json:"dir"`
	// Tests are the names of those to run. All of them must pass.
	Tests []string `json:"tests"`
	// Parts is a regular expression of the tests within tests to run; empty: all.
	Parts string `json:"parts,omitempty"`
	// Env is added to the guest's environment.
	Env []string `json:"env"`
	// Seconds bounds the run.
	Seconds int `json:"seconds"`
}

// result is what came of a plan.
type result struct {
	Nonce string `json:"nonce"`
	// Passed, Failed and Skipped are names of tests, without their parts.
	Passed  []string `json:"passed"`
	Failed  []string `json:"failed"`
	Skipped []string `json:"skipped"`
	// Parts counts the tests within tests that passed.
	Parts   int     `json:"parts"`
	Error   string  `json:"error,omitempty"` // how the program ended, if not with status 0
	Seconds float64 `json:"seconds"`         // by the guest's clock
}
