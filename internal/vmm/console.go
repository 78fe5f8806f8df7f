package vmm

import (
	"context"
	"fmt"
	"time"
)

// Explain adds what the guest's kernel said last to why a machine did not come
// up, where its engine can tell. It works too when ctx has ended.
func Explain(ctx context.Context, vm VM, err error) error {
	teller, ok := vm.(interface {
		Console(ctx context.Context) (string, error)
	})
	if !ok {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	const shown = 400
	text, consoleErr := teller.Console(ctx)
	if consoleErr != nil || text == "" {
		return err
	}
	return fmt.Errorf("%w; the guest's console ends: %q", err, text[max(0, len(text)-shown):])
}
