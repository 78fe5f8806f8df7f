package block

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
)

// fields are the names of an object's fields and where their values go.
type fields map[string]any

// decodeObject reads a JSON object as Forge does: names match to the letter,
// each is there once, those needed are there, and unknown ones are passed over.
// An optional one may be missing or null.
func decodeObject(data []byte, what string, needed, optional fields) error {
	raw, err := members(data)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errdef.ErrInvalid, what, err)
	}
	for _, name := range slices.Sorted(maps.Keys(needed)) {
		value, ok := raw[name]
		if !ok || string(value) == "null" {
			return fmt.Errorf("%w: %s has no %s", errdef.ErrInvalid, what, name)
		}
		if err = decodeField(value, what, name, needed[name]); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(optional)) {
		if value, ok := raw[name]; ok && string(value) != "null" {
			if err = decodeField(value, what, name, optional[name]); err != nil {
				return err
			}
		}
	}
	return nil
}

// decodeField reads one value. What this package found wrong is passed on as it
// is, since its text is a promise.
func decodeField(value json.RawMessage, what, name string, to any) error {
	err := json.Unmarshal(value, to)
	if err == nil || errors.Is(err, errdef.ErrInvalid) {
		return err
	}
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("%w: %s: %s: a JSON %s does not belong here", errdef.ErrInvalid, what, name, wrong.Value)
	}
	return fmt.Errorf("%w: %s: %s: %w", errdef.ErrInvalid, what, name, err)
}

// marshal writes JSON without escaping what only HTML needs escaped: a range is
// ">= 1", as Forge writes it, if the caller's encoder leaves it so too.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// members splits an object into its fields.
func members(data []byte) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	if first, err := d.Token(); err != nil || first != json.Delim('{') {
		return nil, errors.New("it is not an object")
	}
	raw := map[string]json.RawMessage{}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		name, _ := key.(string)
		if _, twice := raw[name]; twice {
			return nil, fmt.Errorf("%q is there twice", name)
		}
		var value json.RawMessage
		if err = d.Decode(&value); err != nil {
			return nil, err
		}
		raw[name] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if d.More() {
		return nil, errors.New("something follows it")
	}
	return raw, nil
}
