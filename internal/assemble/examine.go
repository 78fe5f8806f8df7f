package assemble

import (
	"context"

	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/wire"
)

func examine(context.Context, cli.HostOptions) []wire.DoctorCheck { return nil }
