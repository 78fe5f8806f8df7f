package engines

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	verdictVersion = 2
	maxVerdict     = 16 << 10
)

// verdict says whether KVM runs machines of a monitor, and what that was found
// out with.
type verdict struct {
	Version        int    `json:"version"`
	BootID         string `json:"boot_id"`
	Monitor        string `json:"monitor"` // the prober's name
	MonitorVersion string `json:"monitor_version"`
	Kernel         bool   `json:"kernel"` // the probe had a kernel to boot
	Usable         bool   `json:"usable"`
	Reason         string `json:"reason"`
}

// answers says whether v still holds for one who asks in the circumstances of
// want. A verdict that needed no kernel to be negative needs none later.
func (v verdict) answers(want verdict) bool {
	same := v.BootID == want.BootID && v.Monitor == want.Monitor && v.MonitorVersion == want.MonitorVersion
	return same && (v.Kernel || !want.Kernel || !v.Usable)
}

// proof says what a positive verdict rests on.
func (v verdict) proof() string {
	if v.Kernel {
		return "at this boot, a probe machine and a kernel ran"
	}
	return "at this boot, a probe machine ran"
}

func (v verdict) encode() ([]byte, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode verdict on KVM: %w", err)
	}
	return append(data, '\n'), nil
}

func decodeVerdict(data []byte) (verdict, error) {
	var v verdict
	if len(data) > maxVerdict {
		return verdict{}, fmt.Errorf("%w: verdict on KVM of more than %d bytes", errdef.ErrInvalid, maxVerdict)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return verdict{}, fmt.Errorf("%w: verdict on KVM: %w", errdef.ErrInvalid, err)
	}
	if v.Version != verdictVersion || v.BootID == "" || v.Monitor == "" || v.MonitorVersion == "" || v.Reason == "" {
		return verdict{}, fmt.Errorf("%w: verdict on KVM of version %d is not complete", errdef.ErrInvalid, v.Version)
	}
	return v, nil
}

func readVerdict(path string) (verdict, error) {
	f, err := os.Open(path)
	if err != nil {
		return verdict{}, err
	}
	defer func() { _ = f.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(f, maxVerdict+1))
	if err != nil {
		return verdict{}, err
	}
	v, err := decodeVerdict(data)
	if err != nil {
		return verdict{}, fmt.Errorf("read %s: %w", path, err)
	}
	return v, nil
}
