"""The least of a web server: one answer to everything, on port 8000."""
import socket

answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
s = socket.create_server(("127.0.0.1", 8000), backlog=16)
print("ready", flush=True)
while True:
    c, _ = s.accept()
    got = b""
    while b"\r\n\r\n" not in got:
        more = c.recv(4096)
        if not more:
            break
        got += more
    c.sendall(answer)
    c.close()
