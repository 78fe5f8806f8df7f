package record

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Rules say what of an output does not count: each is the name of a rule, and
// they are applied in the order given. Rules are idempotent one by one; two in
// a row need not be.
type Rules struct {
	// Streams are applied to stdout and to stderr.
	Streams []string `json:"streams,omitempty"`
	// Files are applied to every collected file.
	Files []string `json:"files,omitempty"`
}

const (
	// maxRules bounds each list: more names than there are rules say nothing.
	maxRules = 16
	// epochWindow is how far from the start of a run a number may be and still
	// count as a time.
	epochWindow = 24 * time.Hour
)

// rule maps data to its canonical form. start is when the run began.
type rule struct {
	name, does string
	apply      func(data []byte, start time.Time) []byte
}

const (
	month       = `(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)`
	optionalDay = `(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),? )?`
)

// The patterns of the rules. Where a match has to begin and end at the edge of a
// word it begins and ends with part of a word, so that what is put in its place
// makes no edge where there was none, and a second pass finds nothing.
var (
	escapes   = regexp.MustCompile(`\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])?`)
	isoTimes  = regexp.MustCompile(`\b\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?:[Zz]|[+-]\d{2}:?\d{2})?\b`)
	logTimes  = regexp.MustCompile(`\b` + optionalDay + month + ` [ \d]\d \d{2}:\d{2}:\d{2}(?: [AP]M)?(?: (?:[A-Z]{3,5} )?\d{4})?\b`)
	mailTimes = regexp.MustCompile(`\b` + optionalDay + `\d{1,2} ` + month + ` \d{4} \d{2}:\d{2}:\d{2}(?: (?:GMT|UTC|[+-]\d{4}))?\b`)
	numbers   = regexp.MustCompile(`\b(?:\d{10}|\d{13}|\d{16}|\d{19})\b`)
	durations = regexp.MustCompile(`\b\d+(?:\.\d+)? ?(?:ns|us|µs|ms|s|sec|secs|seconds?)\b`)
	tempPaths = regexp.MustCompile(`(/tmp/)[A-Za-z0-9._+@%=~-]+`)
	pids      = regexp.MustCompile(`\b([Pp][Ii][Dd](?:: |[ =:]))\d+\b`)
	logPids   = regexp.MustCompile(`(\w\[)\d+(\]:)`)
	procPids  = regexp.MustCompile(`(/proc/)\d+\b`)
	addresses = regexp.MustCompile(`\b0x[0-9a-fA-F]{4,16}\b`)
	uuids     = regexp.MustCompile(`\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b`)
)

// rules in the order in which a person would list them.
var rules = []rule{
	{"ansi", "removes escape sequences of terminals, and every ESC", escapeFree},
	{"timestamps", "dates with times, as of RFC 3339, syslog, date(1) and mail, become <time>", inTurn(lines(isoTimes, "-", "<time>"), lines(mailTimes, ":", "<time>"), lines(logTimes, ":", "<time>"))},
	{"epoch", "seconds, milli-, micro- and nanoseconds since 1970 within a day of the start become <epoch>", epochs},
	{"durations", "numbers of seconds or parts of them, with their unit, become <duration>", lines(durations, "s", "<duration>")},
	{"tmp", "the name after /tmp/ becomes <tmp>", lines(tempPaths, "/tmp/", "${1}<tmp>")},
	{"pids", "numbers after pid, in name[N]: and after /proc/ become <pid>", inTurn(lines(pids, "", "${1}<pid>"), lines(logPids, "]:", "${1}<pid>${2}"), lines(procPids, "/proc/", "${1}<pid>"))},
	{"addresses", "0x and 4 to 16 hexadecimal digits become <address>", lines(addresses, "0x", "<address>")},
	{"uuids", "UUIDs become <uuid>", lines(uuids, "-", "<uuid>")},
	{"trailing-space", "removes spaces, tabs and carriage returns at the ends of lines", trimLines},
	{"sort-lines", "sorts lines by their bytes", sortLines},
}

// RuleInfo is a rule for people.
type RuleInfo struct {
	Name string `json:"name"`
	Does string `json:"does"`
}

// AllRules lists the rules there are.
func AllRules() []RuleInfo {
	var all []RuleInfo
	for _, r := range rules {
		all = append(all, RuleInfo{r.name, r.does})
	}
	return all
}

// Validate returns errdef.ErrInvalid for a rule that there is not.
func (r Rules) Validate() error {
	for _, list := range [][]string{r.Streams, r.Files} {
		if len(list) > maxRules {
			return fmt.Errorf("%w: %d canonicalisation rules, at most %d", errdef.ErrInvalid, len(list), maxRules)
		}
		for _, name := range list {
			if _, err := findRule(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// plain has nil for lists without rules, as in a record that was read.
func (r Rules) plain() Rules {
	return Rules{slices.Clip(append([]string(nil), r.Streams...)), slices.Clip(append([]string(nil), r.Files...))}
}

// Apply returns out in its canonical form, and leaves out alone. start is when
// the run began, by the clock that it saw. Rules that there are not are
// errdef.ErrInvalid.
func (r Rules) Apply(out Output, start time.Time) (Output, error) {
	if err := r.Validate(); err != nil {
		return Output{}, err
	}
	out.Stdout = applyAll(r.Streams, out.Stdout, start)
	out.Stderr = applyAll(r.Streams, out.Stderr, start)
	out.Files = slices.Clone(out.Files)
	for i := range out.Files {
		out.Files[i].Data = applyAll(r.Files, out.Files[i].Data, start)
	}
	return out, nil
}

// applyAll applies rules that are known to be there.
func applyAll(names []string, data []byte, start time.Time) []byte {
	for _, name := range names {
		if r, err := findRule(name); err == nil {
			data = r.apply(data, start)
		}
	}
	return data
}

func findRule(name string) (rule, error) {
	for _, r := range rules {
		if r.name == name {
			return r, nil
		}
	}
	return rule{}, fmt.Errorf("%w: canonicalisation rule %.40q", errdef.ErrInvalid, name)
}

// escapeFree works on all of the data: what it removes may go over lines.
func escapeFree(data []byte, _ time.Time) []byte { return escapes.ReplaceAll(data, nil) }

// lines puts with in the place of what a pattern finds in each line. No pattern
// matches a line feed, and package regexp is much quicker with short texts. A
// line without part cannot match.
func lines(pattern *regexp.Regexp, part, with string) func([]byte, time.Time) []byte {
	return func(data []byte, _ time.Time) []byte {
		return eachLine(data, func(line []byte) []byte {
			if !bytes.Contains(line, []byte(part)) {
				return line
			}
			return pattern.ReplaceAll(line, []byte(with))
		})
	}
}

// eachLine applies f to each line without its end.
func eachLine(data []byte, f func([]byte) []byte) []byte {
	out := make([]byte, 0, len(data))
	for {
		line, rest, more := bytes.Cut(data, []byte("\n"))
		out = append(out, f(line)...)
		if !more {
			return out
		}
		out, data = append(out, '\n'), rest
	}
}

func trimLines(data []byte, _ time.Time) []byte {
	return eachLine(data, func(line []byte) []byte { return bytes.TrimRight(line, " \t\r") })
}

func inTurn(steps ...func([]byte, time.Time) []byte) func([]byte, time.Time) []byte {
	return func(data []byte, start time.Time) []byte {
		for _, step := range steps {
			data = step(data, start)
		}
		return data
	}
}

// epochs tells a time from another number by its nearness to the start.
func epochs(data []byte, start time.Time) []byte {
	near := func(digits []byte) []byte {
		n, err := strconv.ParseInt(string(digits), 10, 64)
		if err != nil {
			return digits // 19 digits may be more than there are nanoseconds
		}
		var at time.Time
		switch len(digits) {
		case 10:
			at = time.Unix(n, 0)
		case 13:
			at = time.UnixMilli(n)
		case 16:
			at = time.UnixMicro(n)
		default:
			at = time.Unix(0, n)
		}
		if at.Sub(start).Abs() > epochWindow {
			return digits
		}
		return []byte("<epoch>")
	}
	return eachLine(data, func(line []byte) []byte { return numbers.ReplaceAllFunc(line, near) })
}

// sortLines keeps a last line without an end what it is: without one.
func sortLines(data []byte, _ time.Time) []byte {
	body, whole := bytes.CutSuffix(data, []byte("\n"))
	lines := bytes.Split(body, []byte("\n"))
	slices.SortFunc(lines, bytes.Compare)
	sorted := bytes.Join(lines, []byte("\n"))
	if whole {
		sorted = append(sorted, '\n')
	}
	return sorted
}
