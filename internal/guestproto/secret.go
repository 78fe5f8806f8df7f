package guestproto

import (
	"fmt"
	"io"
)

// Secret is a value that a guest is trusted with. Its value shows in no log and
// in no JSON.
type Secret struct {
	Name  string // see CheckSecretName
	Value []byte // at most MaxSecret
}

func (m *Secret) code(c *coder) {
	c.string(&m.Name)
	c.bytes(&m.Value)
}

// Format writes the secret's name, whatever the verb.
func (m Secret) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, "secret "+m.Name) // what prints it says how that went
}

// MarshalText returns the secret's name.
func (m Secret) MarshalText() ([]byte, error) { return []byte("secret " + m.Name), nil }

// CheckSecrets says what is wrong with a list of secrets: a bad name, one that
// comes twice, or more than a guest may hold.
func CheckSecrets(secrets []Secret) error {
	if len(secrets) > MaxSecrets {
		return fmt.Errorf("%d secrets are over the limit of %d", len(secrets), MaxSecrets)
	}
	total := 0
	for i, s := range secrets {
		if err := CheckSecretName(s.Name); err != nil {
			return err
		}
		if len(s.Value) > MaxSecret {
			return fmt.Errorf("secret %s: %d bytes are over the limit of %d", s.Name, len(s.Value), MaxSecret)
		}
		for _, before := range secrets[:i] {
			if before.Name == s.Name {
				return fmt.Errorf("secret %s comes twice", s.Name)
			}
		}
		total += len(s.Value)
	}
	if total > MaxSecretsSize {
		return fmt.Errorf("secrets of %d bytes are over the limit of %d", total, MaxSecretsSize)
	}
	return nil
}

// CheckSecretName refuses a name that is not 1 to 64 letters, digits, dots,
// dashes and underscores, the first of them a letter, a digit or an underscore.
// It is the name of a file, and may be that of an environment variable.
func CheckSecretName(name string) error {
	const longest = 64
	bad := name == "" || len(name) > longest || name[0] == '.' || name[0] == '-'
	for i := range len(name) {
		c := name[i]
		letter := 'a' <= c|0x20 && c|0x20 <= 'z'
		bad = bad || !letter && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.'
	}
	if bad {
		return fmt.Errorf("secret name %.80q is not made of letters, digits and ._- as it must be", name)
	}
	return nil
}
