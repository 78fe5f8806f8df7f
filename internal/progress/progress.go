// Package progress carries news of long work from where it happens to whoever
// shows it: a line on a terminal, or JSON events on a wire.
package progress

import "context"

// Event is one piece of news. Message is a short phrase in the present tense
// ("downloading packages"). Total is 0 where the amount of work is not known.
type Event struct {
	Step    string `json:"step"`
	Message string `json:"message"`
	Done    int64  `json:"done,omitempty"`
	Total   int64  `json:"total,omitempty"`
}

// Func receives events. It is called from the goroutine that does the work and
// must not block for long. It may be called from several goroutines at once.
type Func func(Event)

type key struct{}

// With returns a context whose work reports to f.
func With(ctx context.Context, f Func) context.Context {
	return context.WithValue(ctx, key{}, f)
}

// Report sends an event to the context's Func, if it has one.
func Report(ctx context.Context, step, message string) {
	ReportAmount(ctx, step, message, 0, 0)
}

// ReportAmount is Report with how much is done, of how much.
func ReportAmount(ctx context.Context, step, message string, done, total int64) {
	if f, ok := ctx.Value(key{}).(Func); ok && f != nil {
		f(Event{Step: step, Message: message, Done: done, Total: total})
	}
}
