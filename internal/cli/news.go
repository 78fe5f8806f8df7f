package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/term"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/progress"
)

// news shows how long work goes: a line that changes on a terminal, a line for
// each message elsewhere, or JSON. It is safe for concurrent use.
type news struct {
	mu   sync.Mutex
	w    io.Writer
	show func(*news, client.Progress)
	last string
	open bool // a line stands on the terminal without its end
}

func (a *app) newNews() *news {
	n := &news{w: a.Stderr, show: (*news).line}
	f, isFile := a.Stderr.(*os.File)
	switch {
	case a.flags.quiet:
		n.show = func(*news, client.Progress) {}
	case a.flags.json:
		n.show = (*news).object
	case isFile && term.IsTerminal(int(f.Fd())):
		n.show = (*news).update
	}
	return n
}

// report shows p.
func (n *news) report(p client.Progress) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.show(n, p)
}

// context returns a context whose work reports here.
func (n *news) context(ctx context.Context) context.Context {
	return progress.With(ctx, func(e progress.Event) {
		n.report(client.Progress{Step: e.Step, Message: e.Message, Done: e.Done, Total: e.Total})
	})
}

// close leaves the terminal at the start of an empty line.
func (n *news) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open {
		n.write("\r\x1b[K")
		n.open = false
	}
}

func (n *news) line(p client.Progress) {
	text := p.Step + ": " + p.Message
	if text == n.last {
		return
	}
	n.last = text
	n.write(text + "\n")
}

func (n *news) update(p client.Progress) {
	amount := ""
	if p.Total > 0 {
		amount = fmt.Sprintf(" %d%%", 100*p.Done/p.Total)
	}
	n.open = true
	n.write("\r\x1b[K" + p.Step + ": " + p.Message + amount)
}

func (n *news) object(p client.Progress) {
	data, err := json.Marshal(struct {
		Progress client.Progress `json:"progress"`
	}{p})
	if err == nil { // strings and numbers always encode
		n.write(string(data) + "\n")
	}
}

// write drops errors: news that cannot be shown must not end the work.
func (n *news) write(s string) { _, _ = io.WriteString(n.w, s) }
