package guestproto_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/guestproto"
)

// TestSecretsDoNotShow: not in logs, errors or JSON.
func TestSecretsDoNotShow(t *testing.T) {
	t.Parallel()
	id := guestproto.Identity{Secrets: []guestproto.Secret{{Name: "token", Value: []byte("hunter2")}}}
	var shown strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&shown, verb+" "+verb+" "+verb+"\n", id, &id, id.Secrets[0])
	}
	text, err := json.Marshal(id)
	if err != nil {
		t.Fatal(err)
	}
	shown.Write(text)
	slog.New(slog.NewTextHandler(&shown, nil)).Info("", "id", id, "secret", id.Secrets[0])
	slog.New(slog.NewJSONHandler(&shown, nil)).Info("", "id", id, "secret", &id.Secrets[0])
	for _, form := range []string{"hunter2", "104 117 110", fmt.Sprintf("%x", "hunter2"), "aHVudGVyMg"} {
		if strings.Contains(strings.ToLower(shown.String()), strings.ToLower(form)) {
			t.Errorf("%q shows in %s", form, shown.String())
		}
	}
	if !strings.Contains(shown.String(), "secret token") {
		t.Errorf("the name does not show in %s", shown.String())
	}
}

func FuzzSecretName(f *testing.F) {
	f.Add("TOKEN")
	f.Add("../x")
	f.Add("a\x00")
	f.Fuzz(func(t *testing.T, name string) {
		if guestproto.CheckSecretName(name) == nil && (name == "" || len(name) > 64 || name[0] == '.' || strings.ContainsAny(name, "/\x00=\n ")) {
			t.Errorf("%q is taken for a name", name)
		}
	})
}
