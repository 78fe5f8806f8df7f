package image

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/tinevm/tine/internal/errdef"
)

func gzipPayload(t testing.TB, kernel []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(kernel); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes() // gzip ends in the size
}

func withSize(payload []byte, kernel []byte) []byte {
	return binary.LittleEndian.AppendUint32(payload, uint32(len(kernel)))
}

func zstdPayload(t testing.TB, kernel []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return withSize(w.EncodeAll(kernel, nil), kernel)
}

// lz4Payload packs as the kernel's build does: the legacy frame, in blocks.
func lz4Payload(t testing.TB, kernel []byte, block int) []byte {
	t.Helper()
	out := []byte("\x02\x21\x4c\x18")
	for rest := kernel; len(rest) > 0; {
		part := rest[:min(block, len(rest))]
		rest = rest[len(part):]
		packed := make([]byte, lz4.CompressBlockBound(len(part)))
		n, err := lz4.CompressBlock(part, packed, nil)
		if err != nil || n == 0 {
			t.Fatalf("lz4: %d bytes, %v", n, err)
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(n))
		out = append(out, packed[:n]...)
	}
	return withSize(out, kernel)
}

// xzPayload is elfKernel packed by xz --check=crc32 --x86 --lzma2, as the
// kernel's build packs: no library at hand writes the x86 filter.
const xzPayload = `/Td6WFoAAAFpIt42AgEEACEBGgAByYCz46m/AJRdAD+RRYRoPYmm2orMk+JOwC8jXCLoMNy+Hv2GQqFGPiigLpICU8SKbagnQo3FWeoMuCirzgyv7j1qVVAbA/HwawPtQDl3w1Rl921ivqOn5ZpP51LRoKhgEgDTyCcacBgoywozJfcl7sxa3qu6xQSHDYLso57DP6CkUPnamXJPosaY0RYfw245co2/Nrf5RLZg65nRMgAA3bAzUAABrAHA0w4AGWTq9z4wDYsCAAAAAAFZWg==`

func TestUnpackKernel(t *testing.T) {
	t.Parallel()
	kernel := elfKernel()
	xz, err := base64.StdEncoding.DecodeString(xzPayload)
	if err != nil {
		t.Fatal(err)
	}
	for name, image := range map[string][]byte{
		"elf":            kernel,
		"gzip":           bzImage(gzipPayload(t, kernel)),
		"zstd":           bzImage(zstdPayload(t, kernel)),
		"xz":             bzImage(withSize(xz, kernel)),
		"lz4":            bzImage(lz4Payload(t, kernel, legacyBlock)),
		"lz4_two_blocks": bzImage(lz4Payload(t, kernel, len(kernel)-1000)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := unpackKernel(image)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, kernel) {
				t.Errorf("got %d bytes that differ from the kernel's %d", len(got), len(kernel))
			}
		})
	}
}

func TestUnpackKernelRefuses(t *testing.T) {
	t.Parallel()
	kernel := elfKernel()
	good := bzImage(gzipPayload(t, kernel))
	changed := func(off int, v uint32) []byte {
		image := bytes.Clone(good)
		binary.LittleEndian.PutUint32(image[off:], v)
		return image
	}
	arm := bytes.Clone(kernel)
	binary.LittleEndian.PutUint16(arm[18:], 183)
	for name, tc := range map[string]struct {
		image []byte
		want  error
	}{
		"empty":             {nil, errdef.ErrInvalid},
		"text":              {bytes.Repeat([]byte("hello "), 1000), errdef.ErrInvalid},
		"old_protocol":      {changed(offVersion, 0x207), errdef.ErrUnsupported},
		"payload_outside":   {changed(offPayload, 1<<31), errdef.ErrInvalid},
		"payload_too_long":  {changed(offPayloadLength, 1<<31), errdef.ErrInvalid},
		"payload_too_short": {changed(offPayloadLength, 3), errdef.ErrInvalid},
		"unknown_format":    {bzImage([]byte("BZh91AY&SY\x10\x00\x00\x00")), errdef.ErrUnsupported},
		"huge":              {bzImage(binary.LittleEndian.AppendUint32(zstdPayload(t, kernel), maxKernel+1)), errdef.ErrInvalid},
		"cut_short":         {bzImage(withSize(gzipPayload(t, kernel)[:100], kernel)), errdef.ErrInvalid},
		"lz4_cut_short":     {bzImage(withSize(lz4Payload(t, kernel, legacyBlock)[:100], kernel)), errdef.ErrInvalid},
		"lz4_wrong_size":    {bzImage(withSize(lz4Payload(t, kernel, legacyBlock), kernel[1:])), errdef.ErrInvalid},
		"not_elf":           {bzImage(gzipPayload(t, bytes.Repeat([]byte("x"), 1000))), errdef.ErrInvalid},
		"other_machine":     {bzImage(gzipPayload(t, arm)), errdef.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := unpackKernel(tc.image); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func FuzzUnpackKernel(f *testing.F) {
	kernel := elfKernel()[:4096]
	f.Add(bzImage(gzipPayload(f, kernel)))
	f.Add(bzImage(zstdPayload(f, kernel)))
	f.Add(bzImage(lz4Payload(f, kernel, legacyBlock)))
	f.Add(kernel)
	f.Fuzz(func(t *testing.T, image []byte) {
		// A size is believed before it is tried: keep the fuzzer's memory small.
		if payload, err := bzPayload(image); err == nil && len(payload) >= 4 &&
			binary.LittleEndian.Uint32(payload[len(payload)-4:]) > 1<<20 {
			return
		}
		got, err := unpackKernel(image)
		if err == nil && !bytes.HasPrefix(got, []byte("\x7fELF")) {
			t.Errorf("a kernel that is not ELF: %x", got[:min(len(got), 16)])
		}
	})
}
