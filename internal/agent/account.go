package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// account is a user of the guest.
type account struct {
	name   string
	uid    uint32
	gid    uint32
	groups []uint32
	home   string
	shell  string
	self   bool // the agent's own user: nothing has to be switched
}

// maxAccounts bounds what is read of /etc/passwd and /etc/group.
const maxAccounts = 1 << 20

// account finds the user that spec means: a name or a uid, with an optional
// :group. The empty spec is the agent's own user and costs no look-up.
func (a *Agent) account(spec string) (*account, error) {
	if spec == "" {
		return &account{name: "root", uid: uint32(os.Getuid()), gid: uint32(os.Getgid()), home: a.home, shell: "/bin/sh", self: true}, nil
	}
	name, group, hasGroup := strings.Cut(spec, ":")
	who, err := findUser(name)
	if err != nil {
		return nil, err
	}
	if hasGroup {
		if who.gid, err = findGroup(group); err != nil {
			return nil, err
		}
	} else if who.groups, err = groupsOf(who.name); err != nil {
		return nil, err
	}
	who.self = who.uid == uint32(os.Getuid()) && !hasGroup
	if who.uid == 0 {
		who.home = a.home
	}
	return who, nil
}

// credential is what a process of this user is started with; nil means that
// the agent's own will do.
func (c *account) credential() *syscall.Credential {
	if c.self {
		return nil
	}
	return &syscall.Credential{Uid: c.uid, Gid: c.gid, Groups: c.groups}
}

// findUser looks a user up in /etc/passwd. A uid need not be listed there.
func findUser(name string) (*account, error) {
	id, err := strconv.ParseUint(name, 10, 32)
	numeric := err == nil
	var found *account
	err = eachRecord("/etc/passwd", 7, func(f []string) bool {
		uid, uerr := strconv.ParseUint(f[2], 10, 32)
		gid, gerr := strconv.ParseUint(f[3], 10, 32)
		if uerr != nil || gerr != nil || (f[0] != name && (!numeric || uid != id)) {
			return true
		}
		found = &account{name: f[0], uid: uint32(uid), gid: uint32(gid), home: f[5], shell: f[6]}
		return false
	})
	if err != nil {
		return nil, err
	}
	if found == nil && numeric {
		found = &account{name: name, uid: uint32(id), gid: uint32(id), home: "/", shell: "/bin/sh"}
	}
	if found == nil {
		return nil, failf(errdef.ErrNotFound, "user %s: no such user in the guest", name)
	}
	return found, nil
}

func findGroup(name string) (uint32, error) {
	if id, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(id), nil
	}
	gid, found := uint64(0), false
	err := eachRecord("/etc/group", 4, func(f []string) bool {
		if f[0] == name {
			id, perr := strconv.ParseUint(f[2], 10, 32)
			gid, found = id, perr == nil
		}
		return !found
	})
	if err != nil {
		return 0, err
	}
	if !found {
		return 0, failf(errdef.ErrNotFound, "group %s: no such group in the guest", name)
	}
	return uint32(gid), nil
}

// groupsOf lists the groups that name a user as a member.
func groupsOf(user string) ([]uint32, error) {
	var groups []uint32
	err := eachRecord("/etc/group", 4, func(f []string) bool {
		if slices.Contains(strings.Split(f[3], ","), user) {
			if gid, perr := strconv.ParseUint(f[2], 10, 32); perr == nil {
				groups = append(groups, uint32(gid))
			}
		}
		return true
	})
	return groups, err
}

// nameOf returns the name of an id, or the id itself.
func nameOf(file string, id uint32) string {
	name := strconv.FormatUint(uint64(id), 10)
	want := name
	// A file that cannot be read names nobody.
	_ = eachRecord(file, 3, func(f []string) bool {
		if f[2] == want {
			name = f[0]
			return false
		}
		return true
	})
	return name
}

// eachRecord calls f with the fields of each line, until it returns false. A
// file that does not exist has no lines.
func eachRecord(path string, fields int, f func([]string) bool) error {
	file, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	defer file.Close() //nolint:errcheck // only read from
	lines := bufio.NewScanner(io.LimitReader(file, maxAccounts))
	for lines.Scan() {
		record := strings.Split(lines.Text(), ":")
		if len(record) >= fields && !f(record) {
			return nil
		}
	}
	return lines.Err()
}

// do calls f with the user's rights to files: on a thread of its own whose file
// system ids, and so capabilities, are the user's.
func (c *account) do(f func() error) error {
	if c.self {
		return f()
	}
	result := make(chan error)
	go func() {
		// The thread ends with the goroutine: nothing has to be switched back.
		runtime.LockOSThread()
		var err error
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("panic: %v", r)
			}
			result <- err
		}()
		if err = c.assume(); err == nil {
			err = f()
		}
	}()
	return <-result
}

// assume gives this thread the user's file system ids.
func (c *account) assume() error {
	groups := c.groups
	if len(groups) == 0 {
		groups = []uint32{c.gid}
	}
	if err := setThreadGroups(groups); err != nil {
		return fmt.Errorf("%w: assume groups of %s: %w", errdef.ErrDenied, c.name, err)
	}
	for _, id := range []struct {
		set  func(int) (int, error)
		want uint32
	}{{unix.SetfsgidRetGid, c.gid}, {unix.SetfsuidRetUid, c.uid}} {
		if _, err := id.set(int(id.want)); err != nil {
			return err
		}
		if now, _ := id.set(-1); now != int(id.want) {
			return fmt.Errorf("%w: assume user %s", errdef.ErrDenied, c.name)
		}
	}
	return nil
}

// setThreadGroups sets the supplementary groups of this thread alone; the
// function of that name in package unix sets those of all threads.
func setThreadGroups(groups []uint32) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)),
		uintptr(unsafe.Pointer(&groups[0])), 0) //nolint:gosec // see above
	if errno != 0 {
		return errno
	}
	return nil
}
