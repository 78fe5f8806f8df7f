package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
)

// eventFilter says which events are of interest; what is empty says nothing.
type eventFilter struct {
	types, sandboxes, snapshots []string
}

func (f eventFilter) wants(e client.Event) bool {
	if e.Type == "gap" { // some are missing that it may have wanted
		return true
	}
	snapshot := ""
	if e.Data != nil {
		snapshot = e.Data.Snapshot
	}
	in := func(list []string, value string) bool { return len(list) == 0 || slices.Contains(list, value) }
	return in(f.types, string(e.Type)) && in(f.sandboxes, e.Sandbox) && in(f.snapshots, snapshot)
}

func (a *app) eventsCommand() *cobra.Command {
	var filter eventFilter
	var after string
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Follow what happens to sandboxes and snapshots",
		Long: `Events prints what happens from now on, or after the event with the id that
--after says, until it is interrupted or the daemon ends. With --json each line
is an event as GET /v1/events has it. Of what is filtered by several flags, all
must be so; of one flag's values, one. A gap, where some events are lost, is
always printed.`,
		Example: `  tine events
  tine events --type created --type removed --json
  tine events --sandbox sb-0123456789ab`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error { return a.followEvents(ctx, c, after, filter) })
		}),
	}
	f := cmd.Flags()
	f.StringVar(&after, "after", "", "begin after the event with this `ID`")
	f.StringSliceVar(&filter.types, "type", nil, "only events of these `types`")
	f.StringSliceVar(&filter.sandboxes, "sandbox", nil, "only events of the sandboxes with these `ids`")
	f.StringSliceVar(&filter.snapshots, "snapshot", nil, "only events with snapshots of these `tags`")
	return cmd
}

// followEvents prints events until ctx or the daemon ends. The daemon also lets
// go of who is too slow: whoever has seen something comes again.
func (a *app) followEvents(ctx context.Context, c *client.Client, after string, filter eventFilter) error {
	for again := false; ; again = true {
		seen := false
		err := c.Events(ctx, after, func(e client.Event) error {
			after, seen = e.ID, true
			if !filter.wants(e) {
				return nil
			}
			return a.printEvent(e)
		})
		if _, gone := errors.AsType[*client.UnreachableError](err); again && gone {
			return nil
		}
		if err != nil || !seen {
			return err
		}
	}
}

func (a *app) printEvent(e client.Event) error {
	if a.flags.json {
		line, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("encode event: %w", err)
		}
		return a.printf("%s\n", line)
	}
	text := []string{time.UnixMilli(e.AtUnixMS).Format("2006-01-02T15:04:05.000"), string(e.Type), e.Sandbox}
	if d := e.Data; d != nil {
		text = append(text, d.Snapshot, d.Mode, d.Reason)
		if d.PauseMS > 0 {
			text = append(text, "pause="+strconv.FormatFloat(d.PauseMS, 'f', 1, 64)+"ms")
		}
		if d.TookMS > 0 {
			text = append(text, "took="+strconv.FormatFloat(d.TookMS, 'f', 1, 64)+"ms")
		}
	}
	text = slices.DeleteFunc(text, func(s string) bool { return s == "" })
	return a.printf("%s\n", strings.Join(text, " "))
}
