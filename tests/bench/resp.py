"""The part of Redis's protocol that the benchmark needs, fast enough to read thousands of stream entries a second."""
import socket
import time


class Client:
    def __init__(self, redis):
        self.socket = socket.create_connection(("127.0.0.1", redis.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb", buffering=1 << 20)
        self.answered_at = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.socket.close()

    def send(self, *words):
        words = [str(word).encode() for word in words]
        self.socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))

    def ask(self, *words):
        self.send(*words)
        return self.answer()

    def answer(self):
        """Returns bytes, a number, None, or a list of those. `answered_at` is the time at which it began to arrive."""
        line = self.stream.readline()
        self.answered_at = time.time()
        return self.value(line)

    def value(self, line):
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            return None if rest == b"-1" else self.stream.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else [self.value(self.stream.readline()) for _ in range(int(rest))]
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        raise ConnectionError(f"Redis said {line!r}")
