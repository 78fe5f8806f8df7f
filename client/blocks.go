package client

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"time"

	"github.com/tinevm/tine/internal/wire"
)

// Blocks.
type (
	// Block is a unit of work with a name and a version.
	Block = wire.Block
	// BlockDetail is all that there is of a block.
	BlockDetail = wire.BlockDetail
	// BlockRun says what a run of a block came to.
	BlockRun = wire.BlockRun
	// BlockTrust says how far a block can be trusted, and why.
	BlockTrust = wire.BlockTrust
	// BlockEvidence is a piece of what is known of a block.
	BlockEvidence = wire.BlockEvidence
)

// How a run of a block has ended.
const (
	BlockSucceeded = string(wire.BlockRunStatusSucceeded)
	BlockFailed    = string(wire.BlockRunStatusFailed)
)

// What an audit says.
const (
	AuditPassed   = string(wire.AuditBlockRequestVerdictPassed)
	AuditRejected = string(wire.AuditBlockRequestVerdictRejected)
)

// RunBlockOptions say how to run a block. What they leave out is as the block
// has it.
type RunBlockOptions struct {
	// Stdin is what the command reads: at most 64 MiB; nil is the block's own.
	Stdin []byte
	// Seed, if not nil, and Start, if not zero, take the place of the block's.
	Seed  *int64
	Start time.Time
	// Quarantined runs a block although it is in quarantine.
	Quarantined bool
}

func (o RunBlockOptions) wire() wire.RunBlockRequest {
	r := wire.RunBlockRequest{Seed: o.Seed, Quarantined: o.Quarantined}
	if o.Stdin != nil {
		text := base64.StdEncoding.EncodeToString(o.Stdin)
		r.StdinBase64 = &text
	}
	if !o.Start.IsZero() {
		r.Start = o.Start.UTC().Format(time.RFC3339Nano)
	}
	return r
}

// Blocks lists the blocks, by name and then version.
func (c *Client) Blocks(ctx context.Context) ([]Block, error) {
	return get[[]Block](ctx, c, "/v1/blocks", nil)
}

// BlockPage lists at most limit blocks, as SandboxPage does.
func (c *Client) BlockPage(ctx context.Context, limit int, after string) (blocks []Block, next string, err error) {
	return getPage[Block](ctx, c, "/v1/blocks", limit, after)
}

// Block describes a block, by NAME, of which it takes the highest version,
// NAME@VERSION, or digest.
func (c *Client) Block(ctx context.Context, ref string) (BlockDetail, error) {
	return get[BlockDetail](ctx, c, "/v1/blocks"+segments(ref), nil)
}

// ForgeBlock is a block in the form that Forge exchanges.
func (c *Client) ForgeBlock(ctx context.Context, ref string) (json.RawMessage, error) {
	return get[json.RawMessage](ctx, c, "/v1/blocks"+segments(ref), url.Values{"format": {"forge"}})
}

// AddBlock publishes a block, of the text of its file.
func (c *Client) AddBlock(ctx context.Context, file []byte) (Block, error) {
	return post[Block](ctx, c, "/v1/blocks", wire.AddBlockRequest{File: string(file)})
}

// RemoveBlock removes a block. What is known of it stays.
func (c *Client) RemoveBlock(ctx context.Context, ref string) error {
	return c.call(ctx, http.MethodDelete, "/v1/blocks"+segments(ref), nil, nil, nil)
}

// RunBlock runs a block, and keeps a record of it. report, which may be nil, is
// told how it goes: what the block runs on is made the first time.
func (c *Client) RunBlock(ctx context.Context, ref string, o RunBlockOptions, report func(Progress)) (BlockRun, error) {
	return longCall[BlockRun](ctx, c, "/v1/blocks"+segments(ref, "run"), o.wire(), report)
}

// RunBlockFile is RunBlock for a block that is not published, of the text of its
// file.
func (c *Client) RunBlockFile(ctx context.Context, file []byte, o RunBlockOptions, report func(Progress)) (BlockRun, error) {
	w := o.wire()
	return longCall[BlockRun](ctx, c, "/v1/blocks/run", wire.RunBlockFileRequest{
		File: string(file), StdinBase64: w.StdinBase64, Seed: w.Seed, Start: w.Start,
	}, report)
}

// BlockTrust says how far a block can be trusted, and why.
func (c *Client) BlockTrust(ctx context.Context, ref string) (BlockTrust, error) {
	return get[BlockTrust](ctx, c, "/v1/blocks"+segments(ref, "trust"), nil)
}

// AuditBlock says what looking at a block has shown: AuditPassed or
// AuditRejected, and a line about it. lift ends its quarantine.
func (c *Client) AuditBlock(ctx context.Context, ref, verdict, note string, lift bool) (BlockTrust, error) {
	return post[BlockTrust](ctx, c, "/v1/blocks"+segments(ref, "audits"), wire.AuditBlockRequest{
		Verdict: wire.AuditBlockRequestVerdict(verdict), Note: note, Lift: lift,
	})
}
