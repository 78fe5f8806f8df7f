package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// runPlan runs the plan and reports the result.
func runPlan(ctx context.Context) error {
	data, err := os.ReadFile(planFile)
	if err != nil {
		return err
	}
	var p plan
	if err = json.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	output, err := openPort(outputPort)
	if err != nil {
		return err
	}
	report, err := openPort(resultPort)
	if err != nil {
		return err
	}
	r := p.run(ctx, output)
	r.Nonce = p.Nonce
	return json.NewEncoder(report).Encode(r)
}

// openPort opens a virtio-serial port by its name.
func openPort(name string) (*os.File, error) {
	named, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, file := range named {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(text)) == name {
			return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(file))), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("no port %s", name)
}

// run runs the plan's tests and passes on what they say.
func (p plan) run(ctx context.Context, output io.Writer) result {
	pattern := "^(" + strings.Join(p.Tests, "|") + ")$"
	if p.Parts != "" {
		pattern += "/" + p.Parts
	}
	cmd := exec.CommandContext(ctx, p.Program, "-test.v", "-test.count=1", "-test.timeout="+strconv.Itoa(p.Seconds)+"s", "-test.run="+pattern)
	cmd.Dir = p.Dir
	cmd.Env = append(os.Environ(), p.Env...)
	var t tally
	out := io.MultiWriter(output, &t)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 10 * time.Second // for what a test has left behind, with its output open
	start := time.Now()
	err := cmd.Run()
	t.finish()
	r := t.result
	r.Seconds = time.Since(start).Seconds()
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

// tally reads the outcome of each test from what a test program says.
type tally struct {
	line   bytes.Buffer
	result result
}

// maxLine bounds what is kept of a line; outcomes are shorter.
const maxLine = 4096

func (t *tally) Write(p []byte) (int, error) {
	for _, b := range p {
		if b == '\n' {
			t.finish()
		} else if t.line.Len() < maxLine {
			t.line.WriteByte(b)
		}
	}
	return len(p), nil
}

// finish counts the line, if it is an outcome.
func (t *tally) finish() {
	line := t.line.String()
	t.line.Reset()
	rest, found := strings.CutPrefix(strings.TrimLeft(line, " "), "--- ")
	if !found {
		return
	}
	part := strings.HasPrefix(line, " ")
	outcome, name, _ := strings.Cut(rest, ": ")
	name, _, _ = strings.Cut(name, " ")
	switch {
	case outcome == "PASS" && part:
		t.result.Parts++
	case outcome == "PASS":
		t.result.Passed = append(t.result.Passed, name)
	case outcome == "FAIL" && !part:
		t.result.Failed = append(t.result.Failed, name)
	case outcome == "SKIP":
		t.result.Skipped = append(t.result.Skipped, name)
	}
}
