package record

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxDifferences bounds those of one verdict.
	maxDifferences = 32
	// linesBefore are shown of what is the same, linesAfter of each side.
	linesBefore = 2
	linesAfter  = 4
	// maxShown is how much is shown of a line, lead what of it is before the
	// first byte that differs.
	maxShown = 160
	lead     = 60
)

// Difference is one between a recorded output and a fresh one.
type Difference struct {
	// What differs: "stdout", "exit code", "file /srv/out".
	What string `json:"what"`
	// Recorded and Fresh are the values; of contents size and digest.
	Recorded string `json:"recorded"`
	Fresh    string `json:"fresh"`
	// Offset is the first byte that differs, counted from 0, and Line the line
	// that it is in, counted from 1. They are nil and 0 for what is no content,
	// and where the recorded content is not at hand.
	Offset *int64 `json:"offset,omitempty"`
	Line   int    `json:"line,omitempty"`
	// Diff has the lines around it: "  " before what both have, "- " what was
	// recorded, "+ " what is fresh. Unprintable lines are quoted.
	Diff []string `json:"diff,omitempty"`
}

func differences(r Record, old Source, fresh Output) []Difference {
	was := r.Output
	var all []Difference
	add := func(what, a, b string) {
		if a != b {
			all = append(all, Difference{What: what, Recorded: a, Fresh: b})
		}
	}
	add("exit code", strconv.Itoa(was.Exit), strconv.Itoa(fresh.Exit))
	add("signal", was.Signal, fresh.Signal)
	add("failure", was.Failure, fresh.Failure)
	all = append(all, contentDifference("stdout", was.Stdout, old, fresh.Stdout)...)
	all = append(all, contentDifference("stderr", was.Stderr, old, fresh.Stderr)...)
	all = append(all, fileDifferences(was.Files, old, fresh.Files)...)
	add("virtual time", was.Virtual.String(), fresh.Virtual.String())
	if was.Memory != "" && fresh.Memory != "" {
		add("guest memory", was.Memory, fresh.Memory)
	}
	return all[:min(len(all), maxDifferences)]
}

func fileDifferences(was []RecordedFile, old Source, fresh []File) []Difference {
	var all []Difference
	for _, f := range was {
		i := slices.IndexFunc(fresh, func(g File) bool { return g.Path == f.Path })
		if i < 0 {
			all = append(all, Difference{What: "file " + f.Path, Recorded: describe(f.Blob), Fresh: "not there"})
			continue
		}
		if f.Mode != fresh[i].Mode {
			all = append(all, Difference{What: "mode of " + f.Path, Recorded: fmt.Sprintf("%04o", f.Mode), Fresh: fmt.Sprintf("%04o", fresh[i].Mode)})
		}
		all = append(all, contentDifference("file "+f.Path, f.Blob, old, fresh[i].Data)...)
	}
	for _, g := range fresh {
		if !slices.ContainsFunc(was, func(f RecordedFile) bool { return f.Path == g.Path }) {
			all = append(all, Difference{What: "file " + g.Path, Recorded: "not there", Fresh: describe(blobOf(g.Data))})
		}
	}
	return all
}

func describe(b Blob) string { return fmt.Sprintf("%d bytes, %s", b.Size, b.Digest) }

// contentDifference is none or one.
func contentDifference(what string, was Blob, old Source, fresh []byte) []Difference {
	is := blobOf(fresh)
	if was == is {
		return nil
	}
	d := Difference{What: what, Recorded: describe(was), Fresh: describe(is)}
	if old == nil {
		return []Difference{d}
	}
	recorded, err := old.Blob(was)
	if err != nil {
		d.Diff = []string{"the recorded bytes are not at hand: " + err.Error()}
		return []Difference{d}
	}
	at := firstDifference(recorded, fresh)
	offset := int64(at)
	d.Offset, d.Line, d.Diff = &offset, 1+bytes.Count(recorded[:at], []byte("\n")), diffAt(recorded, fresh, at)
	return []Difference{d}
}

// firstDifference is the first byte that a and b do not share.
func firstDifference(a, b []byte) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// diffAt shows a and b around their first difference.
func diffAt(a, b []byte, at int) []string {
	lineStart := 1 + bytes.LastIndexByte(a[:at], '\n')
	var lines []string
	before := lineStart
	for range linesBefore {
		if before == 0 {
			break
		}
		end := before - 1
		before = 1 + bytes.LastIndexByte(a[:end], '\n')
		lines = append(lines, "  "+show(a[before:end]))
	}
	slices.Reverse(lines)
	from := max(lineStart, at-lead)
	for _, side := range []struct {
		mark string
		data []byte
	}{{"- ", a[from:]}, {"+ ", b[from:]}} {
		lines = append(lines, firstLines(side.mark, side.data)...)
	}
	return lines
}

// firstLines shows the first lines of data.
func firstLines(mark string, data []byte) []string {
	var lines []string
	for range linesAfter {
		if len(data) == 0 {
			break
		}
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		text := mark + show(line)
		if !whole {
			text += " (no end of line)"
		}
		lines, data = append(lines, text), rest
	}
	if len(lines) == 0 {
		return []string{mark + "(end)"}
	}
	return lines
}

// show makes bytes of a guest fit for a terminal.
func show(line []byte) string {
	cut := ""
	if len(line) > maxShown {
		line, cut = line[:maxShown], " ..."
	}
	if unprintable := func(r rune) bool { return !unicode.IsPrint(r) }; !utf8.Valid(line) || strings.ContainsFunc(string(line), unprintable) {
		return strconv.Quote(string(line)) + cut
	}
	return string(line) + cut
}
