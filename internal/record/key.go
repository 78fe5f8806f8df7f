package record

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	keyName = "key.pem"
	// maxKey bounds a key file.
	maxKey = 16 << 10

	privateBlock = "PRIVATE KEY"
	publicBlock  = "PUBLIC KEY"
)

// Key signs records. It never leaves its file but in memory.
type Key struct{ private ed25519.PrivateKey }

// Public is the key that records are verified with.
type Public struct {
	key ed25519.PublicKey
	id  string
}

// Public is the half that may be shown.
func (k *Key) Public() Public {
	public, err := publicOf(k.private.Public())
	if err != nil {
		return Public{} // the public half of an Ed25519 key is one
	}
	return public
}

func publicOf(key any) (Public, error) {
	ed, ok := key.(ed25519.PublicKey)
	if !ok {
		return Public{}, fmt.Errorf("%w: a key of records is one of Ed25519, not %T", errdef.ErrInvalid, key)
	}
	der, err := x509.MarshalPKIXPublicKey(ed)
	if err != nil {
		return Public{}, fmt.Errorf("encode public key: %w", err)
	}
	return Public{ed, Digest(der)}, nil
}

// ID is the digest of the key's SubjectPublicKeyInfo.
func (p Public) ID() string { return p.id }

// PEM is the key as openssl and other tools read it.
func (p Public) PEM() []byte {
	der, err := x509.MarshalPKIXPublicKey(p.key)
	if err != nil {
		return nil // publicOf has done it before
	}
	return pem.EncodeToMemory(&pem.Block{Type: publicBlock, Bytes: der})
}

// ParsePublic reads one public key in PEM.
func ParsePublic(data []byte) (Public, error) {
	der, err := onlyBlock(data, publicBlock)
	if err != nil {
		return Public{}, err
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return Public{}, fmt.Errorf("%w: public key: %w", errdef.ErrInvalid, err)
	}
	return publicOf(key)
}

// parseKey reads a private key in PEM, PKCS #8. Its errors hold nothing of it.
func parseKey(data []byte) (*Key, error) {
	der, err := onlyBlock(data, privateBlock)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: the key is not PKCS #8", errdef.ErrInvalid)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%w: a key of records is one of Ed25519, not %T", errdef.ErrInvalid, key)
	}
	return &Key{private}, nil
}

func onlyBlock(data []byte, want string) ([]byte, error) {
	if len(data) > maxKey {
		return nil, fmt.Errorf("%w: key of more than %d bytes", errdef.ErrInvalid, maxKey)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != want || len(rest) > 0 {
		return nil, fmt.Errorf("%w: the key is not one PEM block %q", errdef.ErrInvalid, want)
	}
	return block.Bytes, nil
}

// LoadKey reads the key of the store in dir. A key that others than its owner
// could have read or replaced is refused: errdef.ErrDenied. One that is not
// there is errdef.ErrNotFound.
func LoadKey(dir string) (_ *Key, err error) {
	if err = checkPrivate(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, keyName)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: key %s", errdef.ErrNotFound, path)
	case err != nil:
		return nil, fmt.Errorf("open key: %w", err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open key: %w", err)
	}
	if err = refuseLoose(path, info, 0o600); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKey+1))
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("read key %s: %w", path, err)
	}
	return key, nil
}

// checkPrivate sees that nobody else could put another key into dir.
func checkPrivate(dir string) error {
	info, err := os.Lstat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: key directory %s", errdef.ErrNotFound, dir)
	case err != nil:
		return fmt.Errorf("open key: %w", err)
	case !info.IsDir():
		return fmt.Errorf("%w: %s is no directory", errdef.ErrInvalid, dir)
	}
	return refuseLoose(dir, info, 0o700)
}

func refuseLoose(path string, info fs.FileInfo, want fs.FileMode) error {
	owner := -1
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		owner = int(st.Uid)
	}
	return checkLoose(path, info, want, owner)
}

func checkLoose(path string, info fs.FileInfo, want fs.FileMode, owner int) error {
	if !info.IsDir() && !info.Mode().IsRegular() {
		return fmt.Errorf("%w: key %s is no file", errdef.ErrDenied, path)
	}
	if mode := info.Mode().Perm(); mode&^want != 0 || owner != os.Geteuid() {
		err := fmt.Errorf("%w: %s has mode %#o and owner %d: others could use or replace the key that signs records", errdef.ErrDenied, path, mode, owner)
		return errdef.WithHint(err, fmt.Sprintf("if nobody has: chmod %o %s", want, path))
	}
	return nil
}

// makeKey makes the key of the store in dir, which is for its owner only. Two
// that make one at the same time get the same.
func makeKey(ctx context.Context, dir string) (_ *Key, err error) {
	lock, err := durable.Lock(ctx, filepath.Join(dir, "key.lock"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, durable.Unlock(lock)) }()
	if key, loadErr := LoadKey(dir); loadErr == nil || !errors.Is(loadErr, errdef.ErrNotFound) {
		return key, loadErr
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	data := pem.EncodeToMemory(&pem.Block{Type: privateBlock, Bytes: der})
	if err = durable.WriteFile(filepath.Join(dir, keyName), data, 0o600); err != nil {
		return nil, err
	}
	return &Key{private}, nil
}
