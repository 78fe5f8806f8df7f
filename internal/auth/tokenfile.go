package auth

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	// minToken and maxToken bound the token of a token file.
	minToken = 16
	maxToken = 4096
	// fileName is the name of who has that token.
	fileName = "token-file"
)

// ReadTokenFile reads a file that holds one token, and refuses one that is too
// short to be a secret, or that was left as a package has brought it.
func ReadTokenFile(path string) (string, error) {
	data, err := readBounded(path, maxToken)
	if err != nil {
		return "", fmt.Errorf("token file: %w", err)
	}
	token := strings.TrimSpace(string(data))
	switch {
	case token == "":
		err = errors.New("is empty")
	case strings.HasPrefix(token, "REPLACE_ME"), strings.HasPrefix(token, "CHANGE_ME"):
		err = errors.New("still has the placeholder")
	case len(token) < minToken:
		err = fmt.Errorf("has a token of less than %d bytes", minToken)
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		err = errors.New("has a token with characters that a header cannot carry")
	default:
		return token, nil
	}
	return "", errdef.WithHint(fmt.Errorf("%w: token file %s %w", errdef.ErrInvalid, path, err),
		"write 32 random bytes into it: head -c 32 /dev/urandom | base64")
}

// readBounded reads a regular file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	// A pipe that nobody writes to must not stop us: it is refused below.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
	} else if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // it was only read
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", errdef.ErrInvalid, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%w: %s has more than %d bytes", errdef.ErrInvalid, path, limit)
	}
	return data, err
}
