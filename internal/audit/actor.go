package audit

import "context"

// Who did something. A token or a user of this host is told by Token and by
// User.
const (
	// Anonymous is whoever nothing is known of.
	Anonymous = "anonymous"
	// Daemon is the daemon itself: a time to live that ran out, a start.
	Daemon = "daemon"
)

// Token is who came with the token of that name.
func Token(name string) string { return "token:" + name }

// User is who came over the unix socket, by user id.
func User(uid string) string { return "unix:" + uid }

type actorKey struct{}

// WithActor says who makes the request of ctx: Token, User or another short
// word and a name. The line that tells how the request ended knows it too, even
// when it is refused at once.
func WithActor(ctx context.Context, who string) context.Context {
	if t := trailOf(ctx); t != nil {
		t.setActor(who)
	}
	return context.WithValue(ctx, actorKey{}, who)
}

// Actor is who makes the request of ctx; Anonymous where nobody has said so.
func Actor(ctx context.Context) string {
	if who, _ := ctx.Value(actorKey{}).(string); who != "" {
		return who
	}
	return Anonymous
}
