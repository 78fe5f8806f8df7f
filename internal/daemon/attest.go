package daemon

import (
	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/deterministic"
)

// openAttestor makes ready to run commands deterministically, and to record
// and verify runs. Sandboxes of runs that are not deterministic are boxes'.
func (d *Daemon) openAttestor(boxes attest.Sandboxes) (err error) {
	d.Runner, err = deterministic.New(deterministic.Config{
		Dir: d.path("runs"), Engine: d.cfg.Engine, Snapshots: d.Snapshots, Images: d.Images, Logger: d.log,
	})
	if err != nil {
		return err
	}
	d.attestor = attest.New(attest.Config{
		Records: d.path("records"), Blocks: d.path("blocks"), Trusted: d.path("trusted-keys"),
		Engine: d.cfg.Engine, Deterministic: d.Runner,
		Sandboxes: boxes, Snapshots: d.Snapshots, Images: d.Images, Logger: d.log,
	})
	return nil
}

// closeAttestor waits for the runs that are under way.
func (d *Daemon) closeAttestor() error {
	d.Runner.Close()
	return d.attestor.Close()
}
