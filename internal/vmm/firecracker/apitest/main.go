package apitest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// What Firecracker ends with (FcExitCode in src/vmm/src/lib.rs).
const (
	exitError = 1
	exitLevel = 152 // a configuration that is wrong
	exitArgs  = 153 // a command line that is wrong
	exitPanic = 134 // SIGABRT, as a shell has it
)

// argument is one that Firecracker's command line can have.
type argument struct {
	name  string
	value bool
	since []string
}

func arguments() []argument {
	return []argument{
		{"api-sock", true, nil},
		{"id", true, nil},
		{"seccomp-filter", true, nil},
		{"no-seccomp", false, nil},
		{"start-time-us", true, nil},
		{"start-time-cpu-us", true, nil},
		{"parent-cpu-time-us", true, nil},
		{"config-file", true, nil},
		{"metadata", true, nil},
		{"no-api", false, nil},
		{"log-path", true, nil},
		{"level", true, nil},
		{"module", true, nil},
		{"show-level", false, nil},
		{"show-log-origin", false, nil},
		{"metrics-path", true, nil},
		{"boot-timer", false, nil},
		{"version", false, nil},
		{"snapshot-version", false, nil},
		{"describe-snapshot", true, nil},
		{"http-api-max-payload-size", true, nil},
		{"mmds-size-limit", true, nil},
		{"enable-pci", false, []string{"1.13.0"}},
	}
}

// Main is a program that is Firecracker as far as this package goes: it reads a
// command line as strictly as that does, without the program's name, serves the
// socket that it names until the process would end, and returns the exit status.
// The command line is put over cfg.
//
// A test binary calls it from TestMain when it was started by a name, or with a
// variable, that the test has chosen. The socket of such a process stays when it
// is killed. What is started with --config-file, --no-api or --metadata is
// refused: the stand-in does not know what Firecracker would make of those.
func Main(args []string, cfg Config, stdout, stderr io.Writer) int {
	if cfg.Version == "" {
		cfg.Version = api.Newest.String()
	}
	version, err := api.ParseVersion(cfg.Version)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return exitError
	}
	if i := slices.Index(args, "--"); i >= 0 {
		args = args[:i]
	}
	switch {
	case slices.Contains(args, "--version"):
		_, _ = fmt.Fprintf(stdout, "Firecracker v%v\n\n", version)
		return 0
	case slices.Contains(args, "--help"), slices.Contains(args, "-h"):
		_, _ = fmt.Fprintf(stdout, "Firecracker v%v\n\n", version)
		return 0
	}
	values, err := parse(args, version)
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "Error: ParseArguments(%v)\n", err)
		return exitArgs
	}
	if _, ok := values["snapshot-version"]; ok {
		_, _ = fmt.Fprintf(stdout, "v%s\n", formatOf(version))
		return 0
	}
	if code := configure(values, &cfg, version, stderr); code != 0 {
		return code
	}
	return run(values["api-sock"], cfg, stdout, stderr)
}

// parse reads a command line. Its errors are Firecracker's, as it debugs them.
func parse(args []string, v api.Version) (map[string]string, error) {
	values := map[string]string{"api-sock": "/run/firecracker.socket"}
	seen := map[string]bool{}
	for i := 0; i < len(args); i++ {
		name, ok := strings.CutPrefix(args[i], "--")
		at := slices.IndexFunc(arguments(), func(a argument) bool { return a.name == name && known(v, a.since) })
		switch {
		case !ok || at < 0:
			return nil, fmt.Errorf("UnexpectedArgument(%q)", name)
		case seen[name]:
			return nil, fmt.Errorf("DuplicateArgument(%q)", name)
		}
		seen[name] = true
		values[name] = ""
		if arguments()[at].value {
			if i++; i == len(args) || strings.HasPrefix(args[i], "--") {
				return nil, fmt.Errorf("MissingValue(%q)", name)
			}
			values[name] = args[i]
		}
	}
	switch {
	case seen["no-api"] && !seen["config-file"]:
		return nil, errors.New(`MissingArgument("config-file")`)
	case seen["no-seccomp"] && seen["seccomp-filter"]:
		return nil, errors.New(`ForbiddenArgument("no-seccomp", "seccomp-filter")`)
	}
	return values, nil
}

// configure puts a command line over cfg.
func configure(values map[string]string, cfg *Config, v api.Version, stderr io.Writer) int {
	for _, name := range []string{"config-file", "no-api", "metadata", "describe-snapshot"} {
		if _, ok := values[name]; ok {
			_, _ = fmt.Fprintf(stderr, "apitest does not know --%s\n", name)
			return exitError
		}
	}
	if id, ok := values["id"]; ok {
		if len(id) < 1 || len(id) > 64 || strings.ContainsFunc(id, func(r rune) bool { return r != '-' && !unicode.IsLetter(r) && !unicode.IsNumber(r) }) {
			_, _ = fmt.Fprintf(stderr, "Firecracker panicked: Invalid instance ID: %q\n", id)
			return exitPanic
		}
		cfg.ID = id
	}
	if l, ok := values["level"]; ok {
		if _, err := level(l, v); err != nil {
			_, _ = fmt.Fprintf(stderr, "Error: InvalidLogLevel(LevelFilterFromStrError(%q))\n", l)
			return exitLevel
		}
	}
	for _, name := range []string{"log-path", "metrics-path"} {
		if path, ok := values[name]; ok {
			if err := touch(path, v); err != nil {
				_, _ = fmt.Fprintf(stderr, "Error: --%s: %s\n", name, osError(err))
				return exitError
			}
		}
	}
	if text, ok := values["http-api-max-payload-size"]; ok {
		limit, err := strconv.Atoi(text)
		if err != nil || limit < 0 {
			_, _ = fmt.Fprintln(stderr, "Firecracker panicked: 'http-api-max-payload-size' parameter expected to be of 'usize' type.")
			return exitPanic
		}
		cfg.MaxPayload = limit
	}
	_, pci := values["enable-pci"]
	cfg.PCI = cfg.PCI || pci
	return 0
}

// run serves a socket until the process would end.
func run(socket string, cfg Config, stdout, stderr io.Writer) int {
	_, _ = fmt.Fprintf(stdout, "[%s:main] Running Firecracker v%s\n", cfg.ID, cfg.Version)
	listener, err := new(net.ListenConfig).Listen(context.Background(), "unix", socket)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		_, _ = fmt.Fprintf(stderr, "Error: RunWithApi(FailedToBindSocket(%q))\n", socket)
		return exitError
	case err != nil:
		_, _ = fmt.Fprintf(stderr, "Error: RunWithApi(FailedToBindAndRunHttpServer(IOError(%s)))\n", osError(err))
		return exitError
	}
	s, err := Serve(listener, cfg)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return exitError
	}
	<-s.Done()
	s.Close()
	return s.code
}
