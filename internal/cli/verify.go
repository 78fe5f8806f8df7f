package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"regexp"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	// maxBundle is what the daemon takes, in base64.
	maxBundle  = 143 << 20
	maxKeyFile = 16 << 10
)

// exitCannotCompare is the exit code of verify where nothing can be said.
const exitCannotCompare = 4

func (a *app) verifyCommand() *cobra.Command {
	var req client.VerifyRequest
	var keys []string
	cmd := &cobra.Command{
		Use:   "verify RECORD|FILE",
		Short: "See whether a record is true, by running it again",
		Long: `Verify looks at a record's signature, contents and place in the chain, runs its
command again, in the same snapshot, and compares everything that came out.

RECORD is a record of the daemon, by 4 or more characters that its id begins
with. FILE is a record from elsewhere: what run --record or record export has
written, or - for standard input. Where a file's name could be an id, write
./NAME. A record that another daemon has signed is looked at if its key is given
with --key; get that from its owner, and not from where you have the record.

Exit codes: 0 verified; 1 mismatch: it came out differently, or is not what was
signed; 4 cannot compare: what is missing is printed. With --offline nothing is
run, and 0 says that nothing is wrong with signature, contents and chain.`,
		Example: `  tine verify 5f2c
  tine verify answer.tar --key their.pem --runs 5
  tine record export 5f2c | tine verify - --json`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeRecordOrFile,
		RunE: a.verb(func(ctx context.Context, args []string) error {
			if err := a.nameRecord(&req, args[0]); err != nil {
				return err
			}
			for _, name := range keys {
				pem, _, err := readRegular(name, maxKeyFile)
				if err != nil {
					return fmt.Errorf("--key: %w", err)
				}
				req.Keys = append(req.Keys, string(pem))
			}
			return a.withClient(ctx, func(c *client.Client) error { return a.verify(ctx, c, req) })
		}),
	}
	f := cmd.Flags()
	f.IntVar(&req.Runs, "runs", 1, "how often to run it")
	f.StringArrayVar(&keys, "key", nil, "trust the public key in `FILE`, too; may be repeated")
	f.BoolVar(&req.Offline, "offline", false, "run nothing")
	f.BoolVar(&req.Believe, "believe", false, "count what is found out for or against the block, though another has signed the record; needs scope admin")
	return cmd
}

// idForm is what a word on the command line has that is an id, or begins one.
var idForm = regexp.MustCompile(`^[0-9a-fA-F][0-9a-fA-F-]{3,35}$`)

// nameRecord reads what the command line calls a record.
func (a *app) nameRecord(req *client.VerifyRequest, word string) error {
	if idForm.MatchString(word) {
		req.ID = word
		return nil
	}
	var data []byte
	var err error
	if word == "-" {
		data, err = io.ReadAll(io.LimitReader(a.Stdin, maxBundle+1))
	} else {
		data, _, err = readRegular(word, maxBundle)
	}
	switch {
	case err != nil:
		return err
	case len(data) > maxBundle:
		return errdef.WithHint(fmt.Errorf("%w: a record of more than %d bytes", errdef.ErrInvalid, maxBundle), "verify it where it was made, by its id")
	case len(data) == 0:
		return fmt.Errorf("%w: %s is empty", errdef.ErrInvalid, word)
	}
	if line := bytes.TrimSpace(data); line[0] == '{' && json.Valid(line) {
		req.Envelope = line
	} else {
		req.Bundle = data
	}
	return nil
}

func (a *app) verify(ctx context.Context, c *client.Client, req client.VerifyRequest) error {
	news := a.newNews()
	rep, err := c.Verify(ctx, req, news.report)
	news.close()
	if err != nil {
		return err
	}
	if a.flags.json {
		err = a.printJSON(rep)
	} else {
		err = a.printVerifyReport(rep, req.Offline)
	}
	if err != nil {
		return err
	}
	return verifyOutcome(rep, req.Offline)
}

// inOrder reports whether nothing is wrong with a record, as far as can be said
// without running it.
func inOrder(r client.VerifyReport) bool {
	return len(r.Findings) == 0 && r.Chain != client.ChainBroken
}

// verifyOutcome is the error that makes this program exit as documented.
func verifyOutcome(r client.VerifyReport, offline bool) error {
	switch {
	case r.Result == client.Verified, offline && inOrder(r):
		return nil
	case r.Result == client.Mismatch:
		return &guestExit{code: exitError}
	}
	return &guestExit{code: exitCannotCompare}
}

// printVerifyReport writes a report for people.
func (a *app) printVerifyReport(r client.VerifyReport, offline bool) error {
	head := r.Result
	if offline && inOrder(r) {
		head = "in order"
	}
	if a.flags.quiet {
		return a.printf("%s\n", head)
	}
	var t table
	t.add(head, dash(r.ID))
	if r.KeyID != "" {
		t.add("  signed by", r.KeyID)
		t.add("  chain", dash(r.Chain))
		t.add("  mode", dash(r.Mode))
	}
	if r.Block != "" {
		t.add("  block", r.Block)
	}
	if r.Runs > 0 {
		t.add("  runs", fmt.Sprintf("%d of %d agree", r.Agreed, r.Runs))
	}
	for _, f := range r.Findings {
		t.add("  "+f.Kind, f.Detail)
	}
	for _, m := range r.Missing {
		t.add("  missing", m)
	}
	if r.Verdict == nil {
		return a.print(r, t)
	}
	for _, n := range r.Verdict.Notes {
		t.add("  note", n)
	}
	t.add("  worth", r.Verdict.Worth)
	if err := a.print(r, t); err != nil {
		return err
	}
	for _, d := range r.Verdict.Differences {
		if err := a.printDifference(d); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) printDifference(d client.VerifyDifference) error {
	where := ""
	if d.Offset != nil {
		where = fmt.Sprintf(", first at byte %d, in line %d", *d.Offset, d.Line)
	}
	if err := a.printf("%s differs%s:\n  recorded %s\n  fresh    %s\n", d.What, where, dash(d.Recorded), dash(d.Fresh)); err != nil {
		return err
	}
	for _, line := range d.Diff {
		if err := a.printf("    %s\n", line); err != nil {
			return err
		}
	}
	return nil
}
