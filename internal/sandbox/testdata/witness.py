"""A witness of instants: a program whose state is all over the machine.

It counts as fast as it can. Count k is written to page k of a big buffer, and
then to a file in memory, to one in the root's overlay, through a pipe and
through a socket, always in that order. So at any instant every page of the
buffer has the one value that it must have, and no place is ahead of the one
before it, nor behind it by more than one.

At SIGUSR1 it looks at all of that and writes what it saw to /tmp/report, with
the longest time between two counts since the last look.
"""
import json, mmap, os, signal, socket, sys, time

pages = int(sys.argv[1]) * 256
buffer = mmap.mmap(-1, pages * 4096)
words = memoryview(buffer).cast("Q")
files = [os.open(p, os.O_RDWR | os.O_CREAT) for p in ("/dev/shm/count", "/root/count")]
out, into = os.pipe()
near, far = socket.socketpair()
count, gap, wanted, last = 0, 0.0, False, time.monotonic()


def look():
    bad = []
    for page in range(pages):
        want = count - (count - page) % pages if count >= page else 0
        if words[page * 512] != want or words[page * 512 + 511] != want:
            bad.append([page, words[page * 512], words[page * 512 + 511], want])
    places = [int(os.pread(f, 20, 0) or b"0") for f in files] + [piped, heard]
    return {"count": count, "bad": bad[:5], "places": places, "gap_ms": gap * 1000,
            "random": os.urandom(8).hex(), "clock": time.time()}


def signalled(*_):
    global wanted
    wanted = True


signal.signal(signal.SIGUSR1, signalled)
piped = heard = 0
print("counting", flush=True)
while True:
    count += 1
    at = (count % pages) * 512
    words[at] = count
    words[at + 511] = count
    if count % 64 == 0:
        text = b"%020d" % count
        for f in files:
            os.pwrite(f, text, 0)
        os.write(into, text)
        piped = int(os.read(out, 20))
        near.send(text)
        heard = int(far.recv(20))
    now = time.monotonic()
    if now - last > gap:
        gap = now - last
    last = now
    if wanted:
        wanted = False
        report = look()
        with open("/tmp/report.new", "w") as f:
            json.dump(report, f)
        os.rename("/tmp/report.new", "/tmp/report")
        gap, last = 0.0, time.monotonic()
