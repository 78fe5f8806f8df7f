package linux

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary runs again as a child that maps a file and changes pages.
const (
	roleEnv   = "TINE_TEST_LINUX_FILE"
	pagesEnv  = "TINE_TEST_LINUX_PAGES"
	filePages = 64
)

func TestMain(m *testing.M) {
	if path := os.Getenv(roleEnv); path != "" {
		if err := mapAndDirty(path, os.Getenv(pagesEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func mapAndDirty(path, pages string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, filePages*PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	sum := 0
	for i := range filePages { // read all: these pages are the page cache's
		sum += int(mem[i*PageSize])
	}
	for page := range strings.FieldsSeq(pages) {
		n, atoiErr := strconv.Atoi(page)
		if atoiErr != nil {
			return atoiErr
		}
		mem[n*PageSize]++
	}
	if _, err = fmt.Println("ready", sum); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin) // until the parent lets go
	return err
}

// startChild runs the child until the test ends and returns its pid and a
// function that ends it and leaves a zombie.
func startChild(t *testing.T, path, pages string) (*exec.Cmd, func()) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "a child (of) tine", pages)
	cmd.Env = append(os.Environ(), roleEnv+"="+path, pagesEnv+"="+pages)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || !strings.HasPrefix(line, "ready") {
		t.Fatalf("child said %q: %v", line, err)
	}
	return cmd, func() { _ = stdin.Close() }
}

// filledFile makes a file of filePages pages without zeros.
func filledFile(t *testing.T) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "pages")
	if err != nil {
		t.Fatal(err)
	}
	if _, err = f.WriteString(strings.Repeat("x", filePages*PageSize)); err != nil {
		t.Fatal(err)
	}
	if err = f.Close(); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}
