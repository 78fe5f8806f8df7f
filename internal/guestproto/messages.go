package guestproto

import "time"

// Empty is the reply of a verb that has nothing to say but that it is done.
type Empty struct{}

func (m *Empty) code(*coder) {}

// Hello starts a session.
type Hello struct {
	Version int
	Nonce   []byte // NonceSize fresh random bytes
}

func (m *Hello) code(c *coder) {
	number(c, &m.Version)
	c.bytes(&m.Nonce)
}

// HelloAck confirms the session that Hello with the same nonce started.
type HelloAck struct {
	Version int
	Nonce   []byte
	Agent   string // the agent's own version
}

func (m *HelloAck) code(c *coder) {
	number(c, &m.Version)
	c.bytes(&m.Nonce)
	c.string(&m.Agent)
}

// Reset ends a stream with an error.
type Reset struct {
	Code    string // a word of errdef.Code, or CodeCanceled
	Message string
}

func (m *Reset) code(c *coder) {
	c.string(&m.Code)
	c.string(&m.Message)
}

// Pong answers VerbPing.
type Pong struct {
	Agent      string
	PID        int
	Uptime     time.Duration // of the agent
	Generation string        // of the last identity, "" before the first
}

func (m *Pong) code(c *coder) {
	c.string(&m.Agent)
	number(c, &m.PID)
	number(c, &m.Uptime)
	c.string(&m.Generation)
}

// Identity asks the agent, by VerbIdentity, to make this machine unlike the
// one it was forked from.
type Identity struct {
	Entropy    []byte // fresh random bytes for the kernel's generator
	Clock      int64  // the host's wall clock, nanoseconds since 1970
	Hostname   string
	MachineID  string // 32 hex digits
	BootID     string // a UUID
	Generation string // names this fork; letters, digits and -_. only
	ClockOnly  bool   // only step the clock, as when a parked fork wakes up
	Deadline   time.Duration
	Secrets    []Secret // what this machine is trusted with; see CheckSecrets
	// KeepSecrets keeps those of the machine it was forked from, too. Without
	// it they are wiped.
	KeepSecrets bool
}

func (m *Identity) code(c *coder) {
	c.bytes(&m.Entropy)
	number(c, &m.Clock)
	c.string(&m.Hostname)
	c.string(&m.MachineID)
	c.string(&m.BootID)
	c.string(&m.Generation)
	c.bool(&m.ClockOnly)
	number(c, &m.Deadline)
	messages(c, &m.Secrets)
	c.bool(&m.KeepSecrets)
}

// IdentityDone confirms that every step of Identity was done.
type IdentityDone struct {
	Generation string
	Secrets    int // of those in Identity, how many were put in place
	// Signaled is how many interpreters were in the middle of an evaluation,
	// and were sent the signal that makes them reseed.
	Signaled int
}

func (m *IdentityDone) code(c *coder) {
	c.string(&m.Generation)
	number(c, &m.Secrets)
	number(c, &m.Signaled)
}

// ExecRequest starts a process: VerbExec.
type ExecRequest struct {
	Argv       []string
	Env        []string // NAME=value, added to the defaults
	ReplaceEnv bool     // Env is the whole environment
	Dir        string   // "" is the user's home
	User       string   // name or uid, with an optional :group; "" is root
	Stdin      bool     // stdin comes on ChanStdin; else it is /dev/null
	PTY        bool
	Rows, Cols int
	Timeout    time.Duration // 0 is none
	Background bool          // goes on when the stream is reset
	SecretEnv  []string      // names of secrets to put in the environment, as NAME=value
}

func (m *ExecRequest) code(c *coder) {
	c.strings(&m.Argv)
	c.strings(&m.Env)
	c.bool(&m.ReplaceEnv)
	c.string(&m.Dir)
	c.string(&m.User)
	c.bool(&m.Stdin)
	c.bool(&m.PTY)
	number(c, &m.Rows)
	number(c, &m.Cols)
	number(c, &m.Timeout)
	c.bool(&m.Background)
	c.strings(&m.SecretEnv)
}

// Started is the first message of VerbExec and VerbAttach.
type Started struct {
	PID     int
	Dropped int64 // bytes of output lost before this attachment
}

func (m *Started) code(c *coder) {
	number(c, &m.PID)
	number(c, &m.Dropped)
}

// Exit is the last message of VerbExec and VerbAttach.
type Exit struct {
	Code     int // -1 when a signal ended it
	Signal   int
	TimedOut bool
	Duration time.Duration
}

func (m *Exit) code(c *coder) {
	number(c, &m.Code)
	number(c, &m.Signal)
	c.bool(&m.TimedOut)
	number(c, &m.Duration)
}

// ProcessRequest names a process: VerbAttach.
type ProcessRequest struct {
	PID int
}

func (m *ProcessRequest) code(c *coder) { number(c, &m.PID) }

// ProcessInfo describes a process that the agent started.
type ProcessInfo struct {
	PID        int
	Argv       []string // cut to fit
	User       string
	Dir        string
	Started    int64 // nanoseconds since 1970, by the guest's clock
	PTY        bool
	Background bool
	Attached   bool
	Running    bool
	Exit       Exit // when not Running
	Tag        string
}

func (m *ProcessInfo) code(c *coder) {
	number(c, &m.PID)
	c.strings(&m.Argv)
	c.string(&m.User)
	c.string(&m.Dir)
	number(c, &m.Started)
	c.bool(&m.PTY)
	c.bool(&m.Background)
	c.bool(&m.Attached)
	c.bool(&m.Running)
	exit := []Exit{m.Exit}
	if c.decoding {
		exit = nil
	}
	messages(c, &exit)
	if c.decoding && len(exit) > 0 {
		m.Exit = exit[0]
	}
	c.string(&m.Tag)
}

// SignalRequest sends a signal: VerbSignal.
type SignalRequest struct {
	PID    int
	Signal int
	Group  bool // to its whole process group
}

func (m *SignalRequest) code(c *coder) {
	number(c, &m.PID)
	number(c, &m.Signal)
	c.bool(&m.Group)
}

// ResizeRequest sets the size of a process's terminal: VerbResize.
type ResizeRequest struct {
	PID        int
	Rows, Cols int
}

func (m *ResizeRequest) code(c *coder) {
	number(c, &m.PID)
	number(c, &m.Rows)
	number(c, &m.Cols)
}

// EvalRequest sends a request line to a warm interpreter: VerbEval.
type EvalRequest struct {
	Language string
	Line     []byte // one JSON object, no newline
	Timeout  time.Duration
	ID       int64 // the object's id; the reply line begins with it
}

func (m *EvalRequest) code(c *coder) {
	c.string(&m.Language)
	c.bytes(&m.Line)
	number(c, &m.Timeout)
	number(c, &m.ID)
}

// EvalDone is the last message of VerbEval, after the interpreter's reply line
// on ChanReply.
type EvalDone struct {
	Restarted bool // the interpreter had died; state of earlier calls is lost
	TimedOut  bool
	Killed    bool // it did not stop when interrupted; there is no reply line
}

func (m *EvalDone) code(c *coder) {
	c.bool(&m.Restarted)
	c.bool(&m.TimedOut)
	c.bool(&m.Killed)
}

// WarmRequest starts an interpreter: VerbWarm.
type WarmRequest struct {
	Language string
	Argv     []string // empty: the agent's own for that language
}

func (m *WarmRequest) code(c *coder) {
	c.string(&m.Language)
	c.strings(&m.Argv)
}

// WarmDone answers VerbWarm with the interpreter's first line.
type WarmDone struct {
	PID  int
	Line []byte
}

func (m *WarmDone) code(c *coder) {
	number(c, &m.PID)
	c.bytes(&m.Line)
}

// FileType says what a directory entry is.
type FileType uint8

// The file types.
const (
	TypeOther     FileType = 0
	TypeFile      FileType = 1
	TypeDirectory FileType = 2
	TypeSymlink   FileType = 3
)

// String returns the type's name.
func (t FileType) String() string {
	switch t {
	case TypeFile:
		return "file"
	case TypeDirectory:
		return "directory"
	case TypeSymlink:
		return "symlink"
	default:
		return "other"
	}
}

// Entry describes a file.
type Entry struct {
	Name   string
	Path   string
	Type   FileType
	Size   int64
	Mode   uint32 // permission, setuid, setgid and sticky bits as in st_mode
	UID    uint32
	GID    uint32
	User   string
	Group  string
	MTime  int64  // nanoseconds since 1970
	Target string // of a symbolic link
}

func (m *Entry) code(c *coder) {
	c.string(&m.Name)
	c.string(&m.Path)
	number(c, &m.Type)
	number(c, &m.Size)
	number(c, &m.Mode)
	number(c, &m.UID)
	number(c, &m.GID)
	c.string(&m.User)
	c.string(&m.Group)
	number(c, &m.MTime)
	c.string(&m.Target)
}

// Entries is one message of VerbList's answer.
type Entries struct {
	Entries []Entry
}

func (m *Entries) code(c *coder) { messages(c, &m.Entries) }

// ListDone is the last message of VerbList.
type ListDone struct {
	Truncated bool // there were more than the limit
}

func (m *ListDone) code(c *coder) { c.bool(&m.Truncated) }

// Processes is one message of VerbProcesses' answer.
type Processes struct {
	Processes []ProcessInfo
}

func (m *Processes) code(c *coder) { messages(c, &m.Processes) }

// PathRequest names a file: VerbStat.
type PathRequest struct {
	Path string
	User string // whose home relative paths start at, and whose rights apply
}

func (m *PathRequest) code(c *coder) {
	c.string(&m.Path)
	c.string(&m.User)
}

// ReadRequest reads a file: VerbRead. The answer is an Entry, then the bytes
// on ChanStdout.
type ReadRequest struct {
	Path   string
	User   string
	Offset int64
	Limit  int64 // 0 is no limit
}

func (m *ReadRequest) code(c *coder) {
	c.string(&m.Path)
	c.string(&m.User)
	number(c, &m.Offset)
	number(c, &m.Limit)
}

// WriteRequest writes a file: VerbWrite. The bytes come on ChanStdin.
type WriteRequest struct {
	Path    string
	User    string
	Mode    uint32 // of a new file; 0 is 0644
	Append  bool
	Parents bool // make missing directories
	Create  bool // fail when the file exists
}

func (m *WriteRequest) code(c *coder) {
	c.string(&m.Path)
	c.string(&m.User)
	number(c, &m.Mode)
	c.bool(&m.Append)
	c.bool(&m.Parents)
	c.bool(&m.Create)
}

// ListRequest lists a directory: VerbList.
type ListRequest struct {
	Path  string
	User  string
	Depth int // 1 is the directory's own entries
	Limit int // 0 is the agent's limit
}

func (m *ListRequest) code(c *coder) {
	c.string(&m.Path)
	c.string(&m.User)
	number(c, &m.Depth)
	number(c, &m.Limit)
}

// MkdirRequest makes a directory: VerbMkdir.
type MkdirRequest struct {
	Path    string
	User    string
	Mode    uint32 // 0 is 0755
	Parents bool   // make missing parents; an existing directory is fine
}

func (m *MkdirRequest) code(c *coder) {
	c.string(&m.Path)
	c.string(&m.User)
	number(c, &m.Mode)
	c.bool(&m.Parents)
}

// MoveRequest renames a file: VerbMove.
type MoveRequest struct {
	From string
	To   string
	User string
}

func (m *MoveRequest) code(c *coder) {
	c.string(&m.From)
	c.string(&m.To)
	c.string(&m.User)
}

// RemoveRequest removes a file: VerbRemove.
type RemoveRequest struct {
	Path      string
	User      string
	Recursive bool
}

func (m *RemoveRequest) code(c *coder) {
	c.string(&m.Path)
	c.string(&m.User)
	c.bool(&m.Recursive)
}

// WatchRequest watches a directory or file: VerbWatch. The answer is an Empty
// when the watch stands, then Events until the host resets the stream.
type WatchRequest struct {
	Path      string
	User      string
	Recursive bool
}

func (m *WatchRequest) code(c *coder) {
	c.string(&m.Path)
	c.string(&m.User)
	c.bool(&m.Recursive)
}

// EventType says what happened to a file.
type EventType uint8

// The event types.
const (
	EventCreate EventType = 1
	EventWrite  EventType = 2
	EventRemove EventType = 3
	EventRename EventType = 4 // moved away; where it went is an EventCreate
	EventChmod  EventType = 5
	// EventOverflow: events were lost; look again.
	EventOverflow EventType = 6
)

// String returns the type's name.
func (t EventType) String() string {
	switch t {
	case EventCreate:
		return "create"
	case EventWrite:
		return "write"
	case EventRemove:
		return "remove"
	case EventRename:
		return "rename"
	case EventChmod:
		return "chmod"
	default:
		return "overflow"
	}
}

// Event is one change to a watched file.
type Event struct {
	Type EventType
	Path string // relative to the watched directory
}

func (m *Event) code(c *coder) {
	number(c, &m.Type)
	c.string(&m.Path)
}

// Events is one message of VerbWatch's answer.
type Events struct {
	Events []Event
}

func (m *Events) code(c *coder) { messages(c, &m.Events) }

// ChangesRequest asks what the guest's files hold beyond its image: VerbChanges.
// A limit of 0, or one above the agent's own, is the agent's own.
type ChangesRequest struct {
	Limit     int   // entries
	HashFile  int64 // bytes of the largest file that is hashed
	HashTotal int64 // bytes that are hashed in all
}

func (m *ChangesRequest) code(c *coder) {
	number(c, &m.Limit)
	number(c, &m.HashFile)
	number(c, &m.HashTotal)
}

// ChangeKind says what is at a changed path.
type ChangeKind uint8

// The kinds of change. They begin as FileType does.
const (
	ChangeOther     ChangeKind = 0 // a device, socket or pipe
	ChangeFile      ChangeKind = 1
	ChangeDirectory ChangeKind = 2
	ChangeSymlink   ChangeKind = 3
	// ChangeDeleted: the image has something here, and the machine has not.
	ChangeDeleted ChangeKind = 4
)

// String returns the kind's name.
func (k ChangeKind) String() string {
	if k == ChangeDeleted {
		return "deleted"
	}
	return FileType(k).String()
}

// Change is a path at which the guest's files are not those of its image: new,
// changed, deleted, or a directory above such a one.
type Change struct {
	Path   string
	Kind   ChangeKind
	Mode   uint32 // permission, setuid, setgid and sticky bits as in st_mode
	UID    uint32
	GID    uint32
	Size   int64  // of a file
	MTime  int64  // nanoseconds since 1970
	Hash   []byte // SHA-256 of a file, or empty if it is larger than is hashed
	Target string // of a symbolic link
	Opaque bool   // nothing that the image has in this directory is there any more
}

func (m *Change) code(c *coder) {
	c.string(&m.Path)
	number(c, &m.Kind)
	number(c, &m.Mode)
	number(c, &m.UID)
	number(c, &m.GID)
	number(c, &m.Size)
	number(c, &m.MTime)
	c.bytes(&m.Hash)
	c.string(&m.Target)
	c.bool(&m.Opaque)
}

// Changes is one message of VerbChanges' answer, in order of paths as bytes.
type Changes struct {
	Changes []Change
}

func (m *Changes) code(c *coder) { messages(c, &m.Changes) }

// ChangesDone is the last message of VerbChanges.
type ChangesDone struct {
	Truncated bool // there is more than the limit
}

func (m *ChangesDone) code(c *coder) { c.bool(&m.Truncated) }

// DialRequest connects to a TCP port of the guest's loopback: VerbDial. The
// answer is an Empty once there is a connection. Then bytes go both ways, on
// ChanStdin and ChanStdout.
type DialRequest struct {
	Port int // 1 to MaxPort
}

func (m *DialRequest) code(c *coder) { number(c, &m.Port) }
