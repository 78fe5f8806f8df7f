package assemble

import (
	"context"
	"path/filepath"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/doctor"
	"github.com/tinevm/tine/internal/engines"
	"github.com/tinevm/tine/internal/wire"
)

// examine looks at the host, and at what a daemon on it would need.
func examine(ctx context.Context, o cli.HostOptions) []wire.DoctorCheck {
	agent, _ := agentPath() // doctor says what is wrong with an empty one
	checks := doctor.Run(ctx, doctor.Config{
		StateDir: o.StateDir,
		Socket:   filepath.Join(o.StateDir, "tine.sock"),
		Agent:    agent,
		Engine:   o.Engine,
		Engines:  func(ctx context.Context) []engines.Report { return engines.Survey(ctx, surveyConfig(o)) },
	})
	list := make([]wire.DoctorCheck, len(checks))
	for i, c := range checks {
		list[i] = wire.DoctorCheck{Name: c.Name, Status: wire.DoctorCheckStatus(c.Status), Detail: c.Detail, Hint: c.Hint}
	}
	return list
}

// surveyConfig is engineConfig for one who only looks: no machine will start, and
// the limits that a daemon has set on all of its machines are left alone.
func surveyConfig(o cli.HostOptions) engines.Config {
	cfg := engineConfig(o, logger(o.Log, false, ""))
	cfg.Jail.Spare, cfg.Jail.Total = 0, cgroup.Limits{}
	return cfg
}
