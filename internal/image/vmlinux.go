package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
	"github.com/pierrec/lz4/v4"

	"github.com/tinevm/tine/internal/errdef"
)

// maxKernel bounds a kernel, packed and unpacked.
const maxKernel = 256 << 20

// Where the Linux x86 boot protocol keeps what matters here. The payload
// fields came with version 2.08.
const (
	offSetupSectors  = 0x1f1
	offMagic         = 0x202
	offVersion       = 0x206
	offPayload       = 0x248
	offPayloadLength = 0x24c
	headerEnd        = 0x250
	bootMagic        = "HdrS"
	payloadVersion   = 0x208
	sector           = 512
)

// unpackKernel returns the ELF kernel in a bzImage. What is an ELF kernel
// already comes back as it is.
func unpackKernel(image []byte) ([]byte, error) {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		return image, checkELF(image)
	}
	payload, err := bzPayload(image)
	if err != nil {
		return nil, err
	}
	kernel, err := decompress(payload)
	if err != nil {
		return nil, err
	}
	return kernel, checkELF(kernel)
}

// bzPayload finds the compressed kernel in a bzImage.
func bzPayload(image []byte) ([]byte, error) {
	if len(image) < headerEnd || string(image[offMagic:offMagic+4]) != bootMagic {
		return nil, fmt.Errorf("%w: neither a bzImage nor an ELF file", errdef.ErrInvalid)
	}
	if v := binary.LittleEndian.Uint16(image[offVersion:]); v < payloadVersion {
		return nil, fmt.Errorf("%w: boot protocol %#x is older than %#x", errdef.ErrUnsupported, v, payloadVersion)
	}
	sectors := int64(image[offSetupSectors])
	if sectors == 0 {
		sectors = 4 // the protocol's rule for old loaders
	}
	start := (sectors+1)*sector + int64(binary.LittleEndian.Uint32(image[offPayload:]))
	length := int64(binary.LittleEndian.Uint32(image[offPayloadLength:]))
	if start+length > int64(len(image)) {
		return nil, fmt.Errorf("%w: bzImage ends before its payload", errdef.ErrInvalid)
	}
	return image[start : start+length], nil
}

// sizeWord is the length of the kernel's size, which its build appends to
// every payload whose format does not end in one.
const sizeWord = 4

// decompress unpacks a payload in any of the formats that kernels are built
// with today.
func decompress(payload []byte) ([]byte, error) {
	if len(payload) < 2*sizeWord {
		return nil, fmt.Errorf("%w: payload of %d bytes", errdef.ErrInvalid, len(payload))
	}
	size := binary.LittleEndian.Uint32(payload[len(payload)-sizeWord:])
	if size == 0 || size > maxKernel {
		return nil, fmt.Errorf("%w: kernel of %d bytes: at most %d", errdef.ErrInvalid, size, maxKernel)
	}
	body := payload[:len(payload)-sizeWord]
	switch {
	case bytes.HasPrefix(payload, []byte("\x02\x21\x4c\x18")):
		return unpackLZ4(body[sizeWord:], int(size))
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		return unpackZstd(body, size)
	case bytes.HasPrefix(payload, []byte("\x1f\x8b")):
		r, err := gzip.NewReader(bytes.NewReader(payload)) // whose own end is the size
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		r.Multistream(false)
		return readExactly(r, size)
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		r, err := xz.NewReader(bytes.NewReader(body), maxKernel)
		if err != nil {
			return nil, fmt.Errorf("xz: %w", err)
		}
		return readExactly(r, size)
	default:
		return nil, fmt.Errorf("%w: kernel compression with magic %x", errdef.ErrUnsupported, payload[:sizeWord])
	}
}

func readExactly(r io.Reader, size uint32) ([]byte, error) {
	data := make([]byte, size)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, fmt.Errorf("%w: decompress kernel: %w", errdef.ErrInvalid, err)
	}
	return data, nil
}

func unpackZstd(body []byte, size uint32) ([]byte, error) {
	r, err := zstd.NewReader(bytes.NewReader(body),
		zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxKernel), zstd.WithDecoderMaxWindow(maxKernel))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	defer r.Close()
	return readExactly(r, size)
}

// legacyBlock is how much one block of LZ4's legacy format, which only kernels
// still use, unpacks to at most.
const legacyBlock = 8 << 20

// unpackLZ4 unpacks the blocks of a legacy frame.
func unpackLZ4(blocks []byte, size int) ([]byte, error) {
	out := make([]byte, size)
	done := 0
	for len(blocks) >= sizeWord && done < size {
		length := int64(binary.LittleEndian.Uint32(blocks))
		blocks = blocks[sizeWord:]
		if length > int64(len(blocks)) {
			return nil, fmt.Errorf("%w: lz4 block is cut short", errdef.ErrInvalid)
		}
		n, err := lz4.UncompressBlock(blocks[:length], out[done:min(done+legacyBlock, size)])
		if err != nil {
			return nil, fmt.Errorf("%w: lz4: %w", errdef.ErrInvalid, err)
		}
		blocks, done = blocks[length:], done+n
	}
	if done != size {
		return nil, fmt.Errorf("%w: lz4: %d bytes instead of %d", errdef.ErrInvalid, done, size)
	}
	return out, nil
}

// checkELF makes sure that a kernel is one that QEMU and Firecracker can load.
func checkELF(kernel []byte) error {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return fmt.Errorf("%w: unpacked kernel: %w", errdef.ErrInvalid, err)
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		return fmt.Errorf("%w: kernel is %v %v: want an x86-64 executable", errdef.ErrUnsupported, f.Machine, f.Type)
	}
	return nil
}
