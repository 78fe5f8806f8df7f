package apitest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// schema is one of the structures that Firecracker decodes a body into, as
// serde does: fields in any order, each at most once, none that is not known.
type schema struct {
	name   string // of the structure, as errors have it
	fields []field
	loose  bool // other fields are ignored, and their values anything
}

// field is one field of a structure. Its zero value is a field that has to be
// there.
type field struct {
	name     string
	kind     kind
	optional bool // may be left out
	nullable bool // and may be null
	// since are the versions that have it: the first, and patches of releases
	// before that one which have it too.
	since []string
}

// kind is the type of a value: it returns what it was decoded to, or serde's
// words for what is wrong.
type kind func(value any, v api.Version) (any, error)

// words are Firecracker's, which begin and end otherwise than Go's errors do.
type words string

func (w words) Error() string { return string(w) }

func faultf(format string, args ...any) error { return words(fmt.Sprintf(format, args...)) }

// object is a JSON object with its order and its doublets.
type object []member

type member struct {
	name  string
	value any
}

// known reports whether a version has a thing that came with since.
func known(v api.Version, since []string) bool {
	if len(since) == 0 {
		return true
	}
	for i, s := range since {
		first, err := api.ParseVersion(s)
		if err != nil {
			panic(err)
		}
		if i > 0 && v.Major == first.Major && v.Minor == first.Minor || i == 0 {
			if v.Compare(first) >= 0 {
				return true
			}
		}
	}
	return false
}

// decode reads a body. The error's text is what comes behind "deserializing the
// json body of a request: ", but for line and column, and for the words of an
// error of syntax.
func (s schema) decode(body []byte, v api.Version) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	value, err := readValue(d)
	if err != nil {
		return nil, err
	}
	out, err := s.check(value, v)
	if err != nil {
		return nil, err
	}
	if d.More() {
		return nil, faultf("trailing characters")
	}
	return out, nil
}

// readValue reads one value, with objects as they are written.
func readValue(d *json.Decoder) (any, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	delim, ok := token.(json.Delim)
	switch {
	case !ok:
		return token, nil
	case delim == '[':
		var list []any
		for d.More() {
			item, itemErr := readValue(d)
			if itemErr != nil {
				return nil, itemErr
			}
			list = append(list, item)
		}
		_, err = d.Token()
		return list, err
	}
	var o object
	for d.More() {
		name, nameErr := d.Token()
		if nameErr != nil {
			return nil, nameErr
		}
		value, valueErr := readValue(d)
		if valueErr != nil {
			return nil, valueErr
		}
		o = append(o, member{name.(string), value})
	}
	_, err = d.Token()
	return o, err
}

// check is a kind: a structure within another.
func (s schema) check(value any, v api.Version) (map[string]any, error) {
	o, ok := value.(object)
	if !ok {
		return nil, wrongType(value, "struct "+s.name)
	}
	fields := s.of(v)
	out := map[string]any{}
	for _, m := range o {
		f, ok := find(fields, m.name)
		switch {
		case !ok && s.loose:
			continue
		case !ok:
			return nil, faultf("unknown field `%s`, %s", m.name, expected(fields))
		}
		if _, ok = out[m.name]; ok {
			return nil, faultf("duplicate field `%s`", m.name)
		}
		if m.value == nil && f.nullable {
			out[m.name] = nil
			continue
		}
		decoded, err := f.kind(m.value, v)
		if err != nil {
			return nil, err
		}
		out[m.name] = decoded
	}
	for _, f := range fields {
		if _, ok := out[f.name]; !ok && !f.optional {
			return nil, faultf("missing field `%s`", f.name)
		}
	}
	return out, nil
}

// of are the fields that a version has.
func (s schema) of(v api.Version) []field {
	var fields []field
	for _, f := range s.fields {
		if known(v, f.since) {
			fields = append(fields, f)
		}
	}
	return fields
}

func find(fields []field, name string) (field, bool) {
	for _, f := range fields {
		if f.name == name {
			return f, true
		}
	}
	return field{}, false
}

func expected(fields []field) string {
	var names []string
	for _, f := range fields {
		names = append(names, f.name)
	}
	return oneOf(names)
}

// oneOf is how serde lists what there could have been.
func oneOf(names []string) string {
	switch len(names) {
	case 0:
		return "there are no fields"
	case 1:
		return fmt.Sprintf("expected `%s`", names[0])
	case 2:
		return fmt.Sprintf("expected `%s` or `%s`", names[0], names[1])
	default:
		return "expected one of `" + strings.Join(names, "`, `") + "`"
	}
}

// wrongType names a value as serde does.
func wrongType(value any, want string) error {
	var is string
	switch value := value.(type) {
	case nil:
		is = "null"
	case string:
		is = "string " + strconv.Quote(value)
	case bool:
		is = fmt.Sprintf("boolean `%v`", value)
	case json.Number:
		if is = fmt.Sprintf("integer `%v`", value); strings.ContainsAny(value.String(), ".eE") {
			is = fmt.Sprintf("floating point `%v`", value)
		}
	case []any:
		is = "sequence"
	case object:
		is = "map"
	}
	return faultf("invalid type: %s, expected %s", is, want)
}

func text(want string) kind {
	return func(value any, _ api.Version) (any, error) {
		if s, ok := value.(string); ok {
			return s, nil
		}
		return nil, wrongType(value, want)
	}
}

func boolean(value any, _ api.Version) (any, error) {
	if b, ok := value.(bool); ok {
		return b, nil
	}
	return nil, wrongType(value, "a boolean")
}

// unsigned is a number of so many bits, which Rust calls so.
func unsigned(name string, bits uint) kind {
	return func(value any, _ api.Version) (any, error) {
		number, ok := value.(json.Number)
		if !ok {
			return nil, wrongType(value, name)
		}
		n, ok := new(big.Int).SetString(number.String(), 10)
		switch {
		case !ok:
			return nil, wrongType(value, name)
		case n.Sign() < 0 || n.BitLen() > int(bits):
			return nil, faultf("invalid value: integer `%v`, expected %s", number, name)
		}
		return n.Uint64(), nil
	}
}

func variant(names ...string) kind {
	return func(value any, _ api.Version) (any, error) {
		s, ok := value.(string)
		if !ok {
			return nil, wrongType(value, "string or map")
		}
		if slices.Contains(names, s) {
			return s, nil
		}
		return nil, faultf("unknown variant `%s`, %s", s, oneOf(names))
	}
}

// level is a variant without regard to case.
func level(value any, _ api.Version) (any, error) {
	s, ok := value.(string)
	if !ok {
		return nil, wrongType(value, "a string")
	}
	switch strings.ToLower(s) {
	case "off", "trace", "debug", "info", "warn", "warning", "error":
		return s, nil
	}
	return nil, faultf("Invalid LevelFilter")
}

func mac(value any, _ api.Version) (any, error) {
	s, ok := value.(string)
	if !ok {
		return nil, wrongType(value, "a string")
	}
	if hw, err := net.ParseMAC(s); err != nil || len(hw) != 6 || strings.Count(s, ":") != 5 {
		return nil, faultf("The provided MAC address is invalid.")
	}
	return s, nil
}

func within(s schema) kind {
	return func(value any, v api.Version) (any, error) { return s.check(value, v) }
}

func listOf(s schema) kind {
	return func(value any, v api.Version) (any, error) {
		list, ok := value.([]any)
		if !ok {
			return nil, wrongType(value, "a sequence")
		}
		var out []map[string]any
		for _, item := range list {
			decoded, err := s.check(item, v)
			if err != nil {
				return nil, err
			}
			out = append(out, decoded)
		}
		return out, nil
	}
}

// anything is a value that is not looked into.
func anything(value any, _ api.Version) (any, error) { return value, nil }
