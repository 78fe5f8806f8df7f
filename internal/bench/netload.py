"""What a guest does to a network while that is measured.

"stream" sends so many MiB and waits until the other side says that it has them
all: it prints MiB/s. "trips" sends one byte and waits for it to come back, so
often over one connection; "connects" makes a connection for each: they print ms,
a line for each.
"""
import socket, sys, time

what, host, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
clock = time.perf_counter


def dial():
    s = socket.create_connection((host, port), 60)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def trip(s):
    s.send(b"x")
    if s.recv(1) != b"x":
        sys.exit("the other side has hung up")


if what == "stream":
    block, s = bytes(1 << 20), dial()
    begin = clock()
    for _ in range(count):
        s.sendall(block)
    s.shutdown(socket.SHUT_WR)
    said = b""
    while True:
        got = s.recv(64)
        if not got:
            break
        said += got
    took = clock() - begin
    if int(said or b"0") != count << 20:
        sys.exit("%d MiB were sent, and %r bytes have come" % (count, said))
    print(count / took)
elif what == "trips":
    s, took = dial(), []
    for _ in range(count + 20):
        begin = clock()
        trip(s)
        took.append(clock() - begin)
    for t in took[20:]:
        print("%.4f" % (t * 1000))
else:
    for _ in range(count):
        begin = clock()
        s = dial()
        trip(s)
        print("%.4f" % ((clock() - begin) * 1000))
        s.close()
