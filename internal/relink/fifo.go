package relink

// fifo is bytes that leave in the order in which they came. What has left is
// cleared: it may have been a secret.
type fifo struct {
	buf        []byte
	start, end int // buf[start:end] is in it
}

const minFifo = 4 << 10

func (f *fifo) len() int { return f.end - f.start }

// bytes are all that is in it, until the next push or drop.
func (f *fifo) bytes() []byte { return f.buf[f.start:f.end] }

func (f *fifo) push(p []byte) {
	if len(f.buf)-f.end < len(p) {
		f.makeRoom(len(p))
	}
	f.end += copy(f.buf[f.end:], p)
}

// makeRoom moves what is there to the beginning. That is at most half of buf, so
// that no byte is moved often.
func (f *fifo) makeRoom(n int) {
	old, to := f.bytes(), f.buf
	if need := 2 * (len(old) + n); need > len(to) {
		to = make([]byte, max(need, minFifo))
	}
	size := copy(to, old)
	if len(to) == len(f.buf) {
		old = f.buf[max(size, f.start):f.end]
	}
	clear(old)
	f.buf, f.start, f.end = to, 0, size
}

// drop takes n bytes out.
func (f *fifo) drop(n int) {
	clear(f.buf[f.start : f.start+n])
	f.start += n
	if f.start == f.end {
		f.start, f.end = 0, 0 // stay where memory has been touched
	}
}

func (f *fifo) reset() { f.drop(f.len()) }
