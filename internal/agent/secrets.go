package agent

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// putOnSecrets drops what the parent was trusted with and this machine is not,
// and puts in place what it is. It returns how many that are.
func (a *Agent) putOnSecrets(id *guestproto.Identity) (int, error) {
	dir := a.path(secretsDir)
	if !id.KeepSecrets && !id.ClockOnly {
		if err := dropSecrets(dir); err != nil {
			return 0, err
		}
	}
	if len(id.Secrets) == 0 {
		return 0, nil // as nearly always
	}
	v, err := openVault(dir)
	if err != nil {
		return 0, err
	}
	defer v.close()
	if err = v.admit(id.Secrets); err != nil {
		return 0, err
	}
	for _, s := range id.Secrets {
		if err = v.put(s); err != nil {
			return 0, fmt.Errorf("secret %s: %w", s.Name, err)
		}
		clear(s.Value)
	}
	return len(id.Secrets), nil
}

// dropSecrets removes the directory and what it holds. Files are overwritten
// before, in place: what they held is not to be found in free memory.
func dropSecrets(dir string) error {
	if err := unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
		return nil // as nearly always
	}
	v, err := openVault(dir)
	if err != nil {
		return os.RemoveAll(dir) // it is none of the agent's making
	}
	defer v.close()
	names, err := v.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err = v.drop(name); err != nil && !errors.Is(err, unix.EISDIR) {
			return fmt.Errorf("drop secret %s: %w", name, err)
		}
	}
	return os.RemoveAll(dir)
}

// vault is the directory of secrets. Whoever runs in the guest may have put
// anything there, so nothing in it is followed, waited for or trusted to be
// small.
type vault struct{ dir *os.File }

// openVault opens the directory, and makes it if there is none.
func openVault(path string) (*vault, error) {
	const mode = 0o700
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		if err = os.MkdirAll(path, mode); err != nil {
			return nil, err
		}
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	v := &vault{dir: os.NewFile(uintptr(fd), path)}
	if err = v.dir.Chmod(mode); err != nil {
		v.close()
		return nil, err
	}
	return v, nil
}

func (v *vault) close() { _ = v.dir.Close() } // only looked up in

func (v *vault) names() ([]string, error) {
	if _, err := v.dir.Seek(0, 0); err != nil {
		return nil, err
	}
	return v.dir.Readdirnames(-1)
}

// admit refuses secrets that are too many together with those that stay.
func (v *vault) admit(secrets []guestproto.Secret) error {
	names, err := v.names()
	if err != nil {
		return err
	}
	sizes := map[string]int64{}
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(v.dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			sizes[name] = st.Size
		}
	}
	for _, s := range secrets {
		sizes[s.Name] = int64(len(s.Value))
	}
	total := int64(0)
	for _, size := range sizes {
		total += size
	}
	if len(sizes) > guestproto.MaxSecrets || total > guestproto.MaxSecretsSize {
		return failf(errdef.ErrExhausted, "%d secrets of %d bytes, with those that are kept, are more than a guest may hold", len(sizes), total)
	}
	return nil
}

// put writes a secret, in place of one of that name.
func (v *vault) put(s guestproto.Secret) error {
	if err := v.drop(s.Name); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	const mode = 0o400
	fd, err := unix.Openat(int(v.dir.Fd()), s.Name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	f := os.NewFile(uintptr(fd), s.Name)
	_, err = f.Write(s.Value)
	return errors.Join(err, f.Close())
}

// drop overwrites a file with zeros and removes it.
func (v *vault) drop(name string) error {
	dir := int(v.dir.Fd())
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("fstatat", err)
	}
	// Larger ones are not the agent's, and could take for ever.
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size <= guestproto.MaxSecretsSize {
		if err := v.wipe(name, st.Size); err != nil {
			return err
		}
	}
	return os.NewSyscallError("unlinkat", unix.Unlinkat(dir, name, 0))
}

func (v *vault) wipe(name string, size int64) error {
	const flags = unix.O_WRONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	dir := int(v.dir.Fd())
	fd, err := unix.Openat(dir, name, flags, 0)
	if errors.Is(err, unix.EACCES) { // the agent is not root, as in tests
		if err = unix.Fchmodat(dir, name, 0o600, 0); err == nil {
			fd, err = unix.Openat(dir, name, flags, 0)
		}
	}
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(make([]byte, size))
	return errors.Join(err, f.Close())
}

// secretEnv adds the secrets of these names to an environment.
func (a *Agent) secretEnv(env, names []string) ([]string, error) {
	if len(names) > guestproto.MaxSecrets {
		return nil, failf(errdef.ErrInvalid, "%d secrets are over the limit of %d", len(names), guestproto.MaxSecrets)
	}
	for _, name := range names {
		if err := guestproto.CheckSecretName(name); err != nil {
			return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
		}
		value, err := readSmall(a.path(secretsDir+"/"+name), guestproto.MaxSecret)
		if errors.Is(err, os.ErrNotExist) {
			return nil, failf(errdef.ErrNotFound, "secret %s: this machine has none of that name", name)
		}
		if err != nil {
			return nil, fmt.Errorf("secret %s: %w", name, categorize(err))
		}
		env = mergeEnv(env, []string{name + "=" + string(value)})
		clear(value)
	}
	return env, nil
}
