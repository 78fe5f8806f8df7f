package block

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// writerDir is in the environment of a test binary that is a process that
// writes to the registry there.
const writerDir = "TINE_TEST_BLOCKS_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		if err := writeUntilKilled(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// writeUntilKilled adds blocks and evidence, removes every third block, and
// prints what it was told is done.
func writeUntilKilled(dir string) error {
	r, err := Open(context.Background(), Config{Dir: dir, Known: everyone})
	if err != nil {
		return err
	}
	for i := len(r.List()); ; i++ {
		name := fmt.Sprintf("b%d-%d", os.Getpid(), i)
		e, err := r.Add(AddRequest{File: file(name, "1.0.0"), Level: Three})
		if err != nil {
			return err
		}
		fmt.Println("added", name)
		for k := range 3 {
			if _, err = r.AddStatement(e.Ref.Digest, statement(fmt.Sprintf("k%d", k), "rec", Verified)); err != nil {
				return err
			}
			fmt.Println("said", name)
		}
		if i%3 == 0 {
			fmt.Println("removing", name)
			if err = r.Remove(name, Three); err != nil {
				return err
			}
			fmt.Println("removed", name)
		}
	}
}

// Whenever a writer is killed, what it was told is done is there, and nothing is
// half there.
func TestKilledWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	said := map[string]int{}
	state := map[string]string{}
	for range 8 {
		for _, line := range runAndKill(t, dir) {
			verb, name, _ := strings.Cut(line, " ")
			if verb == "said" {
				said[name]++
			} else {
				state[name] = verb
			}
		}
		r := open(t, dir)
		there := map[string]Entry{}
		for _, e := range r.List() {
			there[e.Ref.Name] = e
		}
		for name, verb := range state {
			if _, ok := there[name]; verb == "added" && !ok || verb == "removed" && ok {
				t.Errorf("%s was %s, and is there: %v", name, verb, ok)
			}
		}
		for name, e := range there {
			trust, err := r.Trust(e.Ref.Digest)
			if err != nil || len(trust.Evidence) < said[name] {
				t.Errorf("%s: %d pieces of %d, %v", name, len(trust.Evidence), said[name], err)
			}
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(state) == 0 {
		t.Error("nothing was written")
	}
}

func runAndKill(t *testing.T, dir string) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var lines []string
	whole := bufio.NewReader(out)
	var timer *time.Timer
	for {
		line, ended := whole.ReadString('\n')
		if ended != nil { // a line that was cut short was not said
			break
		}
		if timer == nil { // it writes
			timer = time.AfterFunc(rand.N(60*time.Millisecond), func() { _ = cmd.Process.Kill() })
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	if err = cmd.Wait(); err == nil {
		t.Error("it was not killed")
	}
	return lines
}
