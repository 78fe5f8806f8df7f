package wire

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRuleForms(t *testing.T) {
	t.Parallel()
	const text = `["a.example:443",{"cidr":"192.0.2.0/24","ports":["80"],"protocol":"tcp"},{"domain":"*"}]`
	var got EgressRules
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	want := EgressRules{{Text: "a.example:443"}, {CIDR: "192.0.2.0/24", Ports: []string{"80"}, Protocol: "tcp"}, {Domain: "*"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if back, err := json.Marshal(got); err != nil || string(back) != text {
		t.Errorf("%s, %v", back, err)
	}
	if err := json.Unmarshal([]byte("null"), &got); err != nil || got != nil {
		t.Errorf("null: %v, %v", got, err)
	}
	for _, bad := range []string{`{}`, `"x"`, `[1]`, `[null]`, `[[]]`, `[{"Port":["1"]}]`, `[{"cidr":1}]`, `[` + strings.Repeat(`"",`, maxEgressRules) + `""]`} {
		if err := json.Unmarshal([]byte(bad), &got); err == nil {
			t.Errorf("%.40s was read", bad)
		}
	}
	var secrets EgressSecrets
	if err := json.Unmarshal([]byte(`[`+strings.Repeat(`{},`, maxEgressSecrets)+`{}]`), &secrets); err == nil {
		t.Error("too many secrets were read")
	}
}

// FuzzRules: what is read can be written, and is the same when read again.
func FuzzRules(f *testing.F) {
	f.Add(`["a.example"]`)
	f.Add(`[{"domain":"a.example","ports":["1-2"]},""]`)
	f.Add(`[{"domain":"a","domain":"b"}, null]`)
	f.Fuzz(func(t *testing.T, text string) {
		var a, b EgressRules
		if json.Unmarshal([]byte(text), &a) != nil {
			return
		}
		data, err := json.Marshal(a)
		if err == nil {
			err = json.Unmarshal(data, &b)
		}
		again, _ := json.Marshal(b) // as before
		if err != nil || string(again) != string(data) {
			t.Errorf("%q became %s and then %s, %v", text, data, again, err)
		}
	})
}
