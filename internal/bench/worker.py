"""What a guest does while it is branched.

It holds so many MiB that it has written, and does what it is told by lines of
input, each of which it answers with one: "rest" sleeps, "watch" looks at the
clock and does nothing else, "write" also writes a page after each look, for
ever around. "again" writes to every page once. "gap" tells the longest time
between two looks since the last line, in ms.
"""
import gc, mmap, os, select, sys, time

pages = int(sys.argv[1]) * 256
buffer = mmap.mmap(-1, max(pages, 1) * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
words = memoryview(buffer).cast("Q")
block = os.urandom(1 << 20)
for at in range(0, pages * 4096, 1 << 20):
    buffer[at:at + (1 << 20)] = block
gc.disable()

clock = time.monotonic
mode, count, turns, gap, last = "rest", 0, 0, 0.0, clock()


def again():
    for page in range(pages):
        words[page * 512] = count + page


def obey(line):
    global mode, count, gap
    if line in ("rest", "watch", "write"):
        mode = line
    elif line == "again":
        count += pages
        again()
    elif line == "gap":
        return "%.3f" % (gap * 1000)
    return "ok"


print("ready", flush=True)
while True:
    turns += 1
    if mode == "rest" or turns % 64 == 0 and select.select([0], [], [], 0)[0]:
        line = sys.stdin.readline()
        if not line:
            break
        print(obey(line.strip()), flush=True)
        gap, last = 0.0, clock()
    if mode == "write" and pages:
        count += 1
        words[count % pages * 512 + 1] = count
    now = clock()
    if now - last > gap:
        gap = now - last
    last = now
