package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Write writes the result for people, or as one JSON object.
func (r *Result) Write(w io.Writer, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(r)
	}
	if _, err := fmt.Fprintf(w, "snapshot %s on %s %s, %d MiB, %d vCPU; host with %d CPUs\n\n",
		r.Snapshot, r.Engine, r.EngineVersion, r.Machine.MemoryMiB, r.Machine.VCPUs, r.CPUs); err != nil {
		return err
	}
	if err := r.writeBranches(w); err != nil {
		return err
	}
	if err := r.writeIsolation(w); err != nil {
		return err
	}
	if err := r.writeRows(w); err != nil {
		return err
	}
	if err := r.writeParallel(w); err != nil {
		return err
	}
	return r.writeEnd(w)
}

// Errors of the writes into a tabwriter show at Flush.

func (r *Result) writeRows(w io.Writer) error {
	if len(r.Rows) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprint(t, "STEP\tEND POINT\tUNIT\tTINE: MEDIAN\tMIN\tP95\tFLOOR: MEDIAN\tMIN\tP95\tRATIO\tTARGET\n")
	for _, row := range r.Rows {
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.Step, orDash(row.Point), row.Unit,
			row.Tine.cells(), row.Floor.cells(), ratioCell(row.Ratio), targetCell(row.Targets))
	}
	return t.Flush()
}

func (r *Result) writeParallel(w io.Writer) error {
	if len(r.Parallel) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprint(t, "\nFORKS AT ONCE\tEND POINT\tTINE: ANSWERED\tWALL ms\tEACH p50\tp95\tFLOOR: ANSWERED\tWALL ms\tEACH p50\tp95\tRATIO\tTARGET\n")
	for _, p := range r.Parallel {
		_, _ = fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\n", p.Forks, p.Point,
			p.Tine.cells(), p.Floor.cells(), ratioCell(p.Ratio), targetCell(p.Targets))
	}
	return t.Flush()
}

// writeEnd says what no table does: why there is no floor, what failed, and how
// many targets were met.
func (r *Result) writeEnd(w io.Writer) error {
	var text strings.Builder
	if r.NoFloor != "" {
		fmt.Fprintf(&text, "floor n/a: %s\n", r.NoFloor)
	}
	for _, what := range r.NotMeasured {
		fmt.Fprintf(&text, "not measured: %s\n", what)
	}
	text.WriteString(r.warnings())
	text.WriteString(r.remarks())
	for _, p := range r.Parallel {
		if p.Tine.Error != "" {
			fmt.Fprintf(&text, "%d forks at once, %s: %s\n", p.Forks, p.Point, p.Tine.Error)
		}
		if p.Floor != nil && p.Floor.Error != "" {
			fmt.Fprintf(&text, "%d forks at once, %s, floor: %s\n", p.Forks, p.Point, p.Floor.Error)
		}
	}
	met, all := r.count()
	_, err := fmt.Fprintf(w, "\n%sbench: %d of %d targets met\n", text.String(), met, all)
	return err
}

// count counts the targets.
func (r *Result) count() (met, all int) {
	add := func(targets []Target) {
		for _, t := range targets {
			all++
			if t.Met {
				met++
			}
		}
	}
	for _, row := range r.Rows {
		add(row.Targets)
	}
	for _, p := range r.Parallel {
		add(p.Targets)
	}
	for _, row := range r.Branches {
		add(row.Targets)
	}
	for _, row := range r.Isolation {
		add(row.Targets)
	}
	return met, all
}

const notAvailable = "n/a"

// cells are three cells: median, min and p95.
func (s *Summary) cells() string {
	if s == nil || s.Samples == 0 {
		return notAvailable + "\t\t"
	}
	return number(s.Median) + "\t" + number(s.Min) + "\t" + number(s.P95)
}

// cells are four cells: how many answered, wall clock, and p50 and p95 of each.
func (g *Group) cells() string {
	if g == nil {
		return notAvailable + "\t\t\t"
	}
	return fmt.Sprintf("%d\t%s\t%s\t%s", g.Answered, number(g.Wall.Median), number(g.Each.Median), number(g.Each.P95))
}

// number has three digits that mean something.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func ratioCell(v float64) string {
	if v == 0 {
		return notAvailable
	}
	return fmt.Sprintf("%.2f", v)
}

func targetCell(targets []Target) string {
	var cells []string
	for _, t := range targets {
		verdict := "met"
		if !t.Met {
			verdict = "NOT MET"
		}
		cells = append(cells, fmt.Sprintf("%s: %s (%s)", t.Goal, verdict, strings.TrimSuffix(number(t.Value), ".00")))
	}
	return orDash(strings.Join(cells, "; "))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
