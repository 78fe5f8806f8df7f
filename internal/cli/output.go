package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
)

// printJSON writes v to standard output.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.Stdout)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// printf writes to standard output.
func (a *app) printf(format string, args ...any) error {
	if _, err := fmt.Fprintf(a.Stdout, format, args...); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// table is an answer of several things alike: the first cell of a row is the
// thing's name.
type table struct {
	header []string
	rows   [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// print writes value as JSON, or t's names, or t, as the flags say.
func (a *app) print(value any, t table) error {
	switch {
	case a.flags.json:
		return a.printJSON(value)
	case a.flags.quiet:
		for _, row := range t.rows {
			if err := a.printf("%s\n", row[0]); err != nil {
				return err
			}
		}
		return nil
	}
	w := tabwriter.NewWriter(a.Stdout, 0, 8, 2, ' ', 0)
	if t.header != nil {
		_, _ = fmt.Fprintln(w, strings.Join(t.header, "\t")) // Flush reports it
	}
	for _, row := range t.rows {
		_, _ = fmt.Fprintln(w, strings.TrimRight(strings.Join(row, "\t"), "\t")) // Flush reports it
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// age says how long ago a time was, if it is known.
func age(unix int64) string {
	if unix == 0 {
		return "-"
	}
	d := max(time.Since(time.Unix(unix, 0)), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// mib says how large something is.
func mib(bytes int64) string {
	return strconv.FormatFloat(float64(bytes)/(1<<20), 'f', 1, 64) + " MiB"
}

// millis says how long something took.
func millis(ms float64) string { return strconv.FormatFloat(ms, 'f', 1, 64) }

// short cuts a digest to what a person compares.
func short(digest string) string {
	_, hex, found := strings.Cut(digest, ":")
	if !found {
		hex = digest
	}
	return hex[:min(12, len(hex))]
}

// lister is the command that lists all objects of one kind.
func lister[T any](a *app, short string, list func(*client.Client, context.Context) ([]T, error), show func(...T) table) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   short,
		Args:    cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				objects, err := list(c, ctx)
				if err != nil {
					return err
				}
				return a.print(objects, show(objects...))
			})
		}),
	}
}
