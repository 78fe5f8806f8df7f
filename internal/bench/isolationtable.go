package bench

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// IsolationRow is one thing that was measured of isolation.
type IsolationRow struct {
	Row
	// FloorIs says what was measured beside it.
	FloorIs string `json:"floor_is,omitempty"`
	// Note says what one has to know of the numbers.
	Note string `json:"note,omitempty"`
	// Error is why there are no numbers, or why some are missing.
	Error string `json:"error,omitempty"`
}

// The units of isolation.
const (
	MiBPerSecond = "MiB/s" // more is better
	Sandboxes    = "sandboxes"
	none         = "-"
)

func (r *Result) writeIsolation(w io.Writer) error {
	if len(r.Isolation) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprint(t, "STEP\tEND POINT\tUNIT\tTINE: MEDIAN\tMIN\tP95\tFLOOR: MEDIAN\tMIN\tP95\tRATIO\tTARGET\tFLOOR IS\n")
	for _, row := range r.Isolation {
		tine := &row.Tine
		if tine.Samples == 0 {
			tine = nil
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.Step, orDash(row.Point), row.Unit,
			tine.cells(), row.Floor.cells(), ratioCell(row.Ratio), targetCell(row.Targets), orDash(row.FloorIs))
	}
	return t.Flush()
}

// remarks are the notes and the failures of isolation, each once with the steps
// that it is about.
func (r *Result) remarks() string {
	var order []string
	steps := map[string][]string{}
	for _, row := range r.Isolation {
		for _, remark := range [][2]string{{"note", row.Note}, {"failed", row.Error}} {
			text := remark[1]
			key := remark[0] + ": " + text
			if text == "" || slices.Contains(steps[key], row.Step) {
				continue
			}
			if steps[key] == nil {
				order = append(order, key)
			}
			steps[key] = append(steps[key], row.Step)
		}
	}
	var text strings.Builder
	for _, key := range order {
		fmt.Fprintf(&text, "%s (%s)\n", key, strings.Join(steps[key], "; "))
	}
	return text.String()
}
