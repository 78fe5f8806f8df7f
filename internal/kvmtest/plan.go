package main

// planFile is where the outer guest finds its plan.
const planFile = "/plan.json"

// The names of the ports that the outer guest speaks through: the tests' own
// words, and one JSON value for each Result and at last one Closing.
const (
	outputPort = "kvmtest.output"
	resultPort = "kvmtest.result"
)

// plan is what the outer guest is to run.
type plan struct {
	// Nonce is in all that the guest reports, so that nothing else is taken for it.
	Nonce string `json:"nonce"`
	Jobs  []job  `json:"jobs"`
}

// job is one run of a test program.
type job struct {
	Engine  string `json:"engine"`
	Package string `json:"package"`
	// Program and Dir are paths in the guest.
	Program string `json:"program"`
	Dir     string `json:"dir"`
	// Tests are the names of those to run. All of them must pass.
	Tests []string `json:"tests"`
	// Env is added to the guest's environment.
	Env []string `json:"env"`
	// Seconds bounds the run.
	Seconds int `json:"seconds"`
}

// result is what came of a job.
type result struct {
	Nonce string `json:"nonce"`
	Job   int    `json:"job"`
	// Passed, Failed and Skipped are names of tests, without their parts.
	Passed  []string `json:"passed"`
	Failed  []string `json:"failed"`
	Skipped []string `json:"skipped"`
	// Parts counts the tests within tests that passed.
	Parts   int     `json:"parts"`
	Error   string  `json:"error,omitempty"` // how the program ended, if not with status 0
	Seconds float64 `json:"seconds"`         // by the guest's clock
}

// closing says that all jobs were run.
type closing struct {
	Nonce string `json:"nonce"`
	Jobs  int    `json:"closing_jobs"`
}
