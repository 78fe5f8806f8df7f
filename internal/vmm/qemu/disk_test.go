package qemu

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

const gib = 1 << 30

// emptyFile is the overlay of an empty disk.
func emptyFile(t testing.TB, size int64) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "overlay")
	if err := createOverlay(path, size); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestOverlayVector: the parts of an empty overlay that are not zero.
func TestOverlayVector(t *testing.T) {
	t.Parallel()
	data := emptyFile(t, 5*gib)
	want := make([]byte, 8<<12)
	for at, text := range map[int]string{
		0: "QFI\xfb\x00\x00\x00\x03" + // version
			"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" + // names no file
			"\x00\x00\x00\x0c" + // clusters of 4 KiB
			"\x00\x00\x00\x01\x40\x00\x00\x00" + // size of the disk
			"\x00\x00\x00\x00" + // not encrypted
			"\x00\x00\x0a\x00" + "\x00\x00\x00\x00\x00\x00\x30\x00" + // 2560 entries of L1
			"\x00\x00\x00\x00\x00\x00\x10\x00" + "\x00\x00\x00\x01" + // a cluster of the table of counts
			"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" + // no snapshots
			"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" + // no features
			"\x00\x00\x00\x04" + "\x00\x00\x00\x68", // counts of 16 bits; the size of this
		1 << 12: "\x00\x00\x00\x00\x00\x00\x20\x00",
		2 << 12: strings.Repeat("\x00\x01", 8),
	} {
		copy(want[at:], text)
	}
	if !bytes.Equal(data, want) {
		t.Errorf("header % x", data[:112])
	}
}

func TestCheckOverlay(t *testing.T) {
	t.Parallel()
	good := emptyFile(t, gib)
	if err := checkOverlay(bytes.NewReader(good), gib); err != nil {
		t.Errorf("an empty one: %v", err)
	}
	be := binary.BigEndian
	for name, spoil := range map[string]func(b []byte){
		"magic":     func(b []byte) { b[0]++ },
		"version":   func(b []byte) { be.PutUint32(b[4:], 2) },
		"names":     func(b []byte) { be.PutUint64(b[8:], 112); be.PutUint32(b[16:], 11) },
		"clusters":  func(b []byte) { be.PutUint32(b[20:], 16) },
		"size":      func(b []byte) { be.PutUint64(b[24:], gib/2) },
		"encrypted": func(b []byte) { be.PutUint32(b[32:], 1) },
		"snapshots": func(b []byte) { be.PutUint32(b[60:], 1) },
		"data file": func(b []byte) { be.PutUint64(b[72:], 1<<2) },
		"dirty":     func(b []byte) { be.PutUint64(b[72:], 1) },
		"parts":     func(b []byte) { be.PutUint64(b[72:], 1<<4) },
		"corrupt":   func(b []byte) { be.PutUint64(b[72:], 2) },
	} {
		bad := bytes.Clone(good)
		spoil(bad)
		if err := checkOverlay(bytes.NewReader(bad), gib); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	for n := range overlayHeader {
		if err := checkOverlay(bytes.NewReader(good[:n]), gib); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("the first %d bytes: %v, want ErrInvalid", n, err)
		}
	}
}

func FuzzCheckOverlay(f *testing.F) {
	f.Add(emptyFile(f, gib)[:overlayHeader])
	f.Add([]byte("QFI\xfb"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if checkOverlay(bytes.NewReader(data), gib) == nil && binary.BigEndian.Uint32(data[16:]) != 0 {
			t.Error("an overlay that names a file passes")
		}
	})
}

// answer is QEMU's, of nodes that are each below the one before it in a list,
// and of a device with the first of the first list.
func answer(lists ...[]string) []byte {
	var b blockGraph
	type node = struct {
		ID   uint64 `json:"id"`
		Type string `json:"type"`
		Name string `json:"name"`
	}
	type edge = struct {
		Parent uint64 `json:"parent"`
		Child  uint64 `json:"child"`
		Name   string `json:"name"`
	}
	b.Nodes = append(b.Nodes, node{1, "block-backend", "/machine/peripheral/disk/virtio-backend"})
	id := uint64(2)
	for i, list := range lists {
		for j, name := range list {
			b.Nodes = append(b.Nodes, node{id, "block-driver", name}, node{id + 1, "block-driver", "#block123"})
			b.Edges = append(b.Edges, edge{id, id + 1, "file"})
			switch {
			case j > 0:
				b.Edges = append(b.Edges, edge{id - 2, id, "backing"})
			case i == 0:
				b.Edges = append(b.Edges, edge{1, id, "root"})
			}
			id += 2
		}
	}
	data, err := json.Marshal(b)
	if err != nil {
		return nil
	}
	return data
}

func TestGraph(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		answer []byte
		want   graph
		err    error
	}{
		"new": {answer([]string{"top-0", "base-0"}), graph{chain: []string{"base-0", "top-0"}, bases: 1, next: 1}, nil},
		"branched": {
			answer([]string{"top-2", "top-0", "base-1", "base-0"}),
			graph{chain: []string{"base-0", "base-1", "top-0", "top-2"}, bases: 2, next: 3},
			nil,
		},
		"spare": {
			answer([]string{"top-9", "base-0"}, []string{"top-10"}),
			graph{chain: []string{"base-0", "top-9"}, bases: 1, spare: "top-10", unused: []string{}, next: 11},
			nil,
		},
		"joined": {
			answer([]string{"top-12", "base-0"}, []string{"top-13"}, []string{"top-9", "top-2", "base-2", "base-1"}),
			graph{chain: []string{"base-0", "top-12"}, bases: 1, spare: "top-13", unused: []string{"top-9", "top-2", "base-2", "base-1"}, next: 14},
			nil,
		},
		"not joined yet": {
			answer([]string{"top-12", "base-0"}, []string{"top-9", "top-2"}),
			graph{chain: []string{"base-0", "top-12"}, bases: 1, unused: []string{"top-9", "top-2"}, next: 13},
			nil,
		},
		"no disk":      {answer(), graph{}, errdef.ErrUnavailable},
		"only frozen":  {answer([]string{"base-0"}), graph{}, errdef.ErrUnavailable},
		"not ours":     {answer([]string{"top-0", "etc-0"}), graph{}, errdef.ErrUnavailable},
		"no bottom":    {answer([]string{"top-1", "top-0"}), graph{}, errdef.ErrUnavailable},
		"wrong bottom": {answer([]string{"top-1", "base-1"}), graph{}, errdef.ErrUnavailable},
		"two bottoms":  {answer([]string{"top-1", "base-0", "base-0"}), graph{}, errdef.ErrUnavailable},
		"circle":       {[]byte(`{"nodes": [{"id": 1, "type": "block-backend"}, {"id": 2, "name": "top-0"}], "edges": [{"parent": 1, "child": 2}, {"parent": 2, "child": 2, "name": "backing"}]}`), graph{}, errdef.ErrUnavailable},
	} {
		var b blockGraph
		if err := json.Unmarshal(tc.answer, &b); err != nil {
			t.Fatal(err)
		}
		got, err := b.disk()
		if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(graph{})); !errors.Is(err, tc.err) || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
}

// FuzzGraph: whatever QEMU says, no file is used but the machine's.
func FuzzGraph(f *testing.F) {
	f.Add(answer([]string{"top-12", "base-0"}, []string{"top-13"}, []string{"top-9", "base-1"}))
	f.Add(answer([]string{"top-1", "base-7"}))
	f.Add(answer([]string{"top--1", "base-0"}))
	f.Add(answer([]string{"top-0/../../x", "base-0"}))
	h := vmm.Handle{Dir: "/machine", Disk: []string{"/store/disk.0", "/store/disk.1"}}
	f.Fuzz(func(t *testing.T, data []byte) {
		var b blockGraph
		if json.Unmarshal(data, &b) != nil {
			return
		}
		g, err := b.disk()
		if err != nil {
			return
		}
		for _, node := range g.chain {
			path, err := diskFile(h, node)
			if err == nil && filepath.Dir(path) != "/machine" && filepath.Dir(path) != "/store" {
				t.Errorf("node %q is the file %s", node, path)
			}
		}
	})
}
