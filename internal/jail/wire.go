package jail

import (
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// Daemon and launcher speak over a pair of sockets that keep messages apart:
// a setup and its answer, a job and, only if it failed, its answer. The
// launcher's end closes when the program runs in its place.
const (
	socketFD = 3 // of the launcher: its end of the pair
	selfFD   = 4 // and this program, which it need not find by a path
	// maxMessage bounds a message; a job has a command line in it.
	maxMessage = 128 << 10
	// maxRights is what the kernel takes at once (SCM_MAX_FD of unix(7)).
	maxRights = 253
)

// setup is what a launcher prepares before it knows its program.
type setup struct {
	// Tree is the path of the root that the program will see; empty: it comes
	// as a mount that is ready to be put in place.
	Tree string `json:"tree,omitempty"`
	// Entrances: how many of the descriptors that come along, the first ones, are
	// control groups to enter.
	Entrances int `json:"entrances,omitempty"`
	// Link asks for a network that leads to the daemon and nowhere else. Tuns: how
	// many of the descriptors that come along, the last ones, are the device to make
	// its tap by; none: the launcher opens it itself.
	Link bool `json:"link,omitempty"`
	Tuns int  `json:"tuns,omitempty"`
	// Own asks for a directory in which the program makes files and sockets.
	Own bool `json:"own,omitempty"`
	// User is who the program will be, as the launcher has its numbers: 0 is the
	// launcher's own user, in a user namespace.
	User int `json:"user,omitempty"`
}

// job is the program to become.
type job struct {
	Path string   `json:"path"`
	Args []string `json:"args"` // with the program's name in front
	Env  []string `json:"env"`
	// Files: how many descriptors come along, output first.
	Files int `json:"files"`
	// Copies are the names that the files that come along after those get in RunDir.
	Copies        []string `json:"copies,omitempty"`
	FileBytes     uint64   `json:"file_bytes"` // of a file, at most
	DieWithParent bool     `json:"die_with_parent,omitempty"`
	Landlock      int      `json:"landlock"` // the kernel's version of it; 0: none
}

// answer says how a setup or a job went.
type answer struct {
	Error string `json:"error,omitempty"`
	Code  string `json:"code,omitempty"` // of errdef
	// Listener: the descriptor that comes along tells of files to be opened.
	Listener bool `json:"listener,omitempty"`
}

func (a answer) err() error {
	if a.Error == "" {
		return nil
	}
	return errdef.Remote(a.Code, a.Error)
}

func failure(err error) answer {
	if err == nil {
		return answer{}
	}
	text := err.Error()
	return answer{Error: text[:min(len(text), 4<<10)], Code: errdef.Code(err)}
}

// sendMessage sends v, and copies of descriptors.
func sendMessage(socket int, v any, fds ...int) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(data) > maxMessage || len(fds) > maxRights {
		return fmt.Errorf("%w: %d bytes and %d files for a launcher", errdef.ErrInvalid, len(data), len(fds))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	err = ignoreInterrupts(func() error { return unix.Sendmsg(socket, data, rights, nil, unix.MSG_NOSIGNAL) })
	if hungUp(err) {
		return errHungUp
	}
	return err
}

// errHungUp: the other side is gone, or has become another program.
var errHungUp = errors.New("the other side has hung up")

// hungUp: a side that leaves with messages unread has reset the connection.
func hungUp(err error) bool { return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) }

// receiveMessage waits for a message. The descriptors are the caller's to close.
func receiveMessage(socket int, v any) (fds []int, err error) {
	data := make([]byte, maxMessage)
	rights := make([]byte, unix.CmsgSpace(4*maxRights))
	var n, rn, flags int
	err = ignoreInterrupts(func() (err error) {
		n, rn, flags, _, err = unix.Recvmsg(socket, data, rights, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err == nil && n == 0 && rn == 0 || hungUp(err) {
		return nil, errHungUp
	}
	if err != nil {
		return nil, err
	}
	fds, err = parseRights(rights[:rn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("%w: message of more than %d bytes or %d files", errdef.ErrInvalid, maxMessage, maxRights)
	}
	if err == nil {
		err = json.Unmarshal(data[:n], v)
	}
	if err != nil {
		closeAll(fds)
		return nil, err
	}
	return fds, nil
}

func parseRights(data []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(data)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		got, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			closeAll(fds)
			return nil, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // nothing was written to it
	}
}

// ignoreInterrupts calls a system call again for as long as a signal interrupts it.
func ignoreInterrupts(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
