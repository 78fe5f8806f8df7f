package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

const (
	// maxEgressRules and maxEgressSecrets bound lists before they are in memory:
	// as text their elements take a few bytes.
	maxEgressRules   = 10_000
	maxEgressSecrets = 64
)

// RuleForm is an egress rule in either of its forms: Text is the short one, and
// the other fields are the parts of the long one. It is not known to be valid.
type RuleForm struct {
	Text     string   `json:"-"`
	CIDR     string   `json:"cidr,omitempty"`
	Domain   string   `json:"domain,omitempty"`
	Ports    []string `json:"ports,omitempty"`
	Protocol string   `json:"protocol,omitempty"`
}

// ruleParts is a RuleForm without methods.
type ruleParts RuleForm

// UnmarshalJSON reads either form. Of the long one no field may be unknown: a
// rule whose ports are misspelled would be for all ports.
func (r *RuleForm) UnmarshalJSON(data []byte) error {
	*r = RuleForm{}
	switch {
	case len(data) > 0 && data[0] == '"':
		return json.Unmarshal(data, &r.Text)
	case len(data) > 0 && data[0] == '{':
		dec := json.NewDecoder(bytes.NewReader(data))
		dec.DisallowUnknownFields()
		if err := dec.Decode((*ruleParts)(r)); err != nil {
			return fmt.Errorf("egress rule: %w", err)
		}
		return nil
	}
	return errors.New("an egress rule is text or an object")
}

// MarshalJSON writes the form that the rule has.
func (r RuleForm) MarshalJSON() ([]byte, error) {
	if r.Text != "" {
		return json.Marshal(r.Text)
	}
	return json.Marshal(ruleParts(r))
}

// EgressRules is a list of rules.
type EgressRules []RuleForm

// UnmarshalJSON reads the list, if it is not too long.
func (l *EgressRules) UnmarshalJSON(data []byte) (err error) {
	*l, err = boundedList[RuleForm](data, maxEgressRules, "egress rules")
	return err
}

// EgressSecrets is a list of secrets.
type EgressSecrets []EgressSecret

// UnmarshalJSON reads the list, if it is not too long. What is wrong with a
// value is not told with the value.
func (l *EgressSecrets) UnmarshalJSON(data []byte) (err error) {
	*l, err = boundedList[EgressSecret](data, maxEgressSecrets, "egress secrets")
	return err
}

// boundedList reads an array, or null, of at most so many elements.
func boundedList[T any](data []byte, most int, what string) ([]T, error) {
	if string(data) == "null" {
		return nil, nil
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if first, err := dec.Token(); err != nil || first != json.Delim('[') {
		return nil, fmt.Errorf("%s are an array", what)
	}
	all := []T{}
	for dec.More() {
		if len(all) == most {
			return nil, fmt.Errorf("more than %d %s", most, what)
		}
		var one T
		if err := dec.Decode(&one); err != nil {
			return nil, fmt.Errorf("%s, number %d: %w", what, len(all)+1, err)
		}
		all = append(all, one)
	}
	return all, nil
}
