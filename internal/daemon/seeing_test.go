package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/vmm/fake"
)

// TestFollowersDoNotHoldTheDaemon sees that a daemon that is told to stop tells
// those who follow its events, and does not wait for them.
func TestFollowersDoNotHoldTheDaemon(t *testing.T) {
	t.Parallel()
	d, err := Open(t.Context(), Config{StateDir: stateDir(t), Ephemeral: true, Engine: fake.New(), DrainTime: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	c, end, err := d.Local(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	began := make(chan struct{})
	over := make(chan error, 1)
	go func() {
		over <- c.Events(t.Context(), "another-0", func(client.Event) error {
			close(began)
			return nil
		})
	}()
	<-began // the gap
	start := time.Now()
	if err = errors.Join(end(context.WithoutCancel(t.Context())), <-over); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("the daemon took %v to stop", took)
	}
}

// logged is a log that several goroutines write.
type logged struct {
	mu sync.Mutex
	bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.Write(p)
}

// TestLogNamesRequests sees that every line of a request's names it.
func TestLogNamesRequests(t *testing.T) {
	t.Parallel()
	log := &logged{}
	d, err := Open(t.Context(), Config{
		StateDir: stateDir(t), Ephemeral: true, Engine: fake.New(), Version: "1.2.3",
		Logger: slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	c, end, err := d.Local(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Sandbox(t.Context(), "sb-none")
	said, ok := errors.AsType[*client.Error](err)
	if !ok || said.RequestID == "" {
		t.Errorf("error %#v", err)
		said = &client.Error{RequestID: "none"}
	}
	if err = end(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
	found := false
	for line := range strings.Lines(log.String()) {
		var fields map[string]any
		if err = json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		found = found || fields["request_id"] == said.RequestID && fields["sandbox"] == "sb-none"
	}
	if !found {
		t.Errorf("no line of request %s:\n%s", said.RequestID, log.String())
	}
}
