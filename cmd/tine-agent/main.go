// Command tine-agent is PID 1 of every Tine guest: it brings the machine up
// and does what the host asks.
package main

import (
	"context"
	"log/slog"
	"os"

	"github.com/tinevm/tine/internal/agent"
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if os.Getpid() != 1 {
		log.Error("tine-agent is the init process of a guest and runs nowhere else")
		os.Exit(2)
	}
	err := agent.RunInit(context.Background(), log)
	log.Error("agent ended", "error", err)
	os.Exit(1)
}
