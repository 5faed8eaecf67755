"""Many token streams at once: is every token there, and how long was it under way?

The connections are open already, so that the price of a token holds no handshakes.  The requests go out evenly
over RAMP seconds, so that tokens come spread over time and not in bursts.  What is counted lies in a window
that opens when all streams run and closes before the first one ends.
"""

from __future__ import annotations

import json
import re
import select
import socket
import ssl
import time
from collections import Counter
from typing import Callable, Final

from upstream import PACE

RAMP: Final = 0.51  # seconds; 25 intervals and a half
LEAD: Final = 0.1  # seconds between ramp and window: the first tokens have come by then
PATIENCE: Final = 10.0  # seconds beyond what it should take
TOKEN: Final = re.compile(rb'"content": ?"(\d{6}) (\d{19})"')

Figures = dict[str, float]
Gauge = Callable[[], tuple[int, float]]  # (CPU in ns, memory in MB) of the gateway until now
Mark = tuple[float, int, int, float]  # an end of the window: seconds, tokens, CPU and memory until then


class Stream:
    """A request, and its answer's checked way through chunks and lines to tokens."""

    def __init__(self, connection: socket.socket, tokens: int, path: str, credential: str) -> None:
        chat = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
        limit = {"max_tokens": tokens} if path.startswith("/v1/") else {"options": {"num_predict": tokens}}
        body = json.dumps({**chat, **limit}, separators=(",", ":"))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{credential}\r\nContent-Type: application/json\r\n"
        self.connection, self.tokens, self.seen, self.wait = connection, tokens, 0, 0
        self.headed = self.done = self.ended = False
        self.raw = self.text = b""
        self.asked = time.monotonic_ns()
        connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())

    def receive(self) -> list[int]:
        """Read what is there; the ages of the tokens in it, in nanoseconds."""
        try:
            data = self.connection.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):  # half a TLS record, or a session ticket
            return []
        now = time.monotonic_ns()
        ages = [now - sent for sent in map(self.check, self.lines(data)) if sent]
        if ages and not self.wait:
            self.wait = now - self.asked
        if self.ended > self.done or not (data or self.ended):
            raise ValueError("the answer ended before its last line")
        return ages

    def lines(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, out of chunks that a gateway may have cut elsewhere."""
        self.raw += data
        if not self.headed:
            head, end, rest = self.raw.partition(b"\r\n\r\n")
            if not end:
                return []
            if b" 200 " not in head[:16]:
                raise ValueError(f"the answer begins with {head.splitlines()[0].decode('latin-1')}")
            self.headed, self.raw = True, rest
        while not self.ended:
            size, end, rest = self.raw.partition(b"\r\n")
            if not end or len(rest) < int(size, 16) + 2:
                break
            content, self.raw = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
            self.text, self.ended = self.text + content, not content
        *whole, self.text = self.text.split(b"\n")
        return whole

    def check(self, line: bytes) -> int:
        """When that line's token was sent, 0 where it holds none; ValueError where the token is not the next."""
        found = TOKEN.search(line)
        self.done = self.done or b'"done":true' in line or line.startswith(b"data: [DONE]")
        if self.seen != (int(found[1]) if found else self.tokens if self.done else self.seen):
            raise ValueError("a token is missing, doubled or out of order")
        self.seen += bool(found)
        return int(found[2]) if found else 0


def run(
    connections: list[socket.socket], seconds: int, path: str, credential: str, gauge: Gauge
) -> tuple[Figures, Counter[str]]:
    """Stream through all the connections; (figures, errors)."""
    tokens = int((RAMP + LEAD + seconds) * PACE) + 1
    poll, streams, running = select.epoll(), list[Stream](), dict[int, Stream]()
    ages, marks, errors = list[int](), list[Mark](), Counter[str]()
    begin = time.monotonic()
    while running or len(streams) < len(connections):
        elapsed = time.monotonic() - begin
        while len(streams) < len(connections) and elapsed >= RAMP * len(streams) / len(connections):
            streams.append(Stream(connections[len(streams)], tokens, path, credential))
            running[streams[-1].connection.fileno()] = streams[-1]
            poll.register(streams[-1].connection, select.EPOLLIN)
        if len(marks) < 2 and elapsed >= RAMP + LEAD + seconds * len(marks):
            marks.append((elapsed, len(ages), *gauge()))
        for descriptor, _ in poll.poll(0.001):
            stream, error = running[descriptor], ""
            try:
                ages += stream.receive()
            except (OSError, ValueError) as problem:
                error = str(problem)
                errors[error] += 1
            if error or stream.ended:
                poll.unregister(descriptor)
                del running[descriptor]
        if elapsed > RAMP + tokens / PACE + PATIENCE:
            errors["no end within the time"] += len(running)
            break
    return figures(marks, ages, [stream.wait for stream in streams if stream.wait]), errors


def figures(marks: list[Mark], ages: list[int], waits: list[int]) -> Figures:
    """What lies between the marks, in the units of the report."""
    if len(marks) < 2 or marks[0][1] == marks[1][1]:  # all streams broke before or within the window
        return {}
    (opened, first, cpu, _), (closed, last, cpu_then, memory) = marks
    ages, waits = sorted(ages[first:last]), sorted(waits)
    return {
        "token": (cpu_then - cpu) / len(ages) / 1e3,
        "pace": len(ages) / (closed - opened),
        "delay_p50": ages[len(ages) // 2] / 1e6,
        "delay_p99": ages[len(ages) * 99 // 100] / 1e6,
        "first_p50": waits[len(waits) // 2] / 1e6,
        "first_p99": waits[len(waits) * 99 // 100] / 1e6,
        "memory": memory,
    }
