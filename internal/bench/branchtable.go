package bench

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// BranchRow is one thing that was measured of branches.
type BranchRow struct {
	MemoryMiB int `json:"memory_mib"` // of the guest
	// Case is what the guest did, or where in a tree it was forked from.
	Case string `json:"case"`
	Mode string `json:"mode,omitempty"` // of the branch
	Row
	// Warning is why a branch was not taken as it was asked for.
	Warning string `json:"warning,omitempty"`
}

// The steps of branches.
const (
	stepPause    = "pause"
	stepGap      = "longest gap inside"
	stepWait     = "longest wait of a client"
	stepTotal    = "until it is ready"
	stepStored   = "size on disk"
	stepMemory   = "memory written"
	stepRollback = "rollback"
	stepSuspend  = "suspend"
	stepResume   = "resume"
)

func (r *Result) writeBranches(w io.Writer) error {
	if len(r.Branches) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprint(t, "GUEST MiB\tCASE\tMODE\tSTEP\tEND POINT\tUNIT\tTINE: MEDIAN\tMIN\tP95\tFLOOR: MEDIAN\tMIN\tP95\tRATIO\tTARGET\n")
	for _, row := range r.Branches {
		_, _ = fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.MemoryMiB, row.Case, orDash(row.Mode), row.Step, orDash(row.Point), row.Unit,
			row.Tine.cells(), row.Floor.cells(), ratioCell(row.Ratio), targetCell(row.Targets))
	}
	return t.Flush()
}

// warnings are those of the branches, each once.
func (r *Result) warnings() string {
	var seen []string
	for _, row := range r.Branches {
		if row.Warning != "" && !slices.Contains(seen, row.Warning) {
			seen = append(seen, row.Warning)
		}
	}
	if len(seen) == 0 {
		return ""
	}
	return "branches: " + strings.Join(seen, "\nbranches: ") + "\n"
}
