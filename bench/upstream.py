"""A stand-in for Ollama that costs next to nothing: `python3 upstream.py PORT` serves until it is stopped.

Every request gets one canned chat, except those with `"stream":true`: they get `num_predict` (`max_tokens`)
tokens at a fixed pace, the first after one interval, as from a model that thinks.  A path in /v1/ is answered
in the manner of OpenAI, as Ollama does, any other in Ollama's own.  A token's text is its number and
when it was sent, by the clock that all processes of a machine share; so whoever reads the stream sees what
was lost or reordered, and how long it took.  One process, one epoll: it must not be what limits a gateway.
"""

from __future__ import annotations

import heapq
import json
import re
import select
import socket
import sys
import time
from typing import Any, Callable, Final

PACE: Final = 50  # tokens per second and stream
INTERVAL: Final = 1_000_000_000 // PACE  # nanoseconds


def compact(answer: dict[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps({"model": "bench", **answer}, separators=(",", ":")).encode() + b"\n"


def line(content: str, tokens: int = 0) -> bytes:
    """A line of Ollama's answer to /api/chat; the last one has the counts."""
    message = {"role": "assistant", "content": content}
    counts = {"done_reason": "stop", "prompt_eval_count": 26, "eval_count": tokens} if tokens else {}
    return compact({"created_at": "2026-01-02T03:04:05.123456789Z", "message": message, "done": tokens > 0, **counts})


def completion(content: str, tokens: int = 0, kind: str = ".chunk") -> bytes:
    """OpenAI's answer to /v1/chat/completions, or what one event of a stream of them holds."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "delta" if kind else "message": message, "finish_reason": "stop" if tokens else None}
    usage = {"usage": {"prompt_tokens": 26, "completion_tokens": tokens, "total_tokens": 26 + tokens}} if tokens else {}
    top = {"id": "chatcmpl-1", "object": f"chat.completion{kind}", "created": 1767323045}
    return compact({**top, "choices": [choice], **usage})


def event(content: str, tokens: int = 0) -> bytes:
    """A server-sent event; behind the last one OpenAI's own mark of the end."""
    return b"data: " + completion(content, tokens) + (b"\ndata: [DONE]\n\n" if tokens else b"\n")


def chunk(content: bytes) -> bytes:
    """A chunk of a chunked body (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(content), content)


HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n"


class Flavour:
    """A manner of answering: a whole answer, and a stream's head, its tokens' template and what makes its pieces."""

    def __init__(self, body: bytes, kind: bytes, piece: Callable[[str, int], bytes]) -> None:
        self.answer = HEAD % (b"application/json", b"Content-Length: %d" % len(body)) + body
        self.head = HEAD % (kind, b"Transfer-Encoding: chunked")
        self.token = chunk(piece("~" * 26, 0)).replace(b"~" * 26, b"%06d %019d")
        self.piece = piece


OLLAMA: Final = Flavour(line("word " * 90, 90), b"application/x-ndjson", line)
OPENAI: Final = Flavour(completion("word " * 90, 90, ""), b"text/event-stream", event)


class Client:
    """A connection, what came in of its next request, and its stream if it has one."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.unread = connection, b""
        self.sent, self.tokens, self.flavour = 0, 0, OLLAMA

    def read(self) -> bool:
        """Take what is there and answer a request that is whole; True when that begins a stream."""
        data = self.connection.recv(65536)
        if not data:
            raise ConnectionError
        self.unread += data
        head, end, body = self.unread.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if not end or (length and len(body) < int(length[1])):
            return False
        self.unread, self.flavour = b"", OPENAI if b" /v1/" in head[:9] else OLLAMA
        tokens = re.search(rb'(?=.*"stream": ?true).*"(?:num_predict|max_tokens)": ?(\d+)', body)
        if tokens:
            self.sent, self.tokens = 0, int(tokens[1])
            return True
        self.connection.send(self.flavour.answer)
        return False

    def send_token(self) -> bool:
        """Send one more, and the end behind the last; whether there are more to come."""
        piece = (b"" if self.sent else self.flavour.head) + self.flavour.token % (self.sent, time.monotonic_ns())
        self.sent += 1
        if self.sent == self.tokens:
            piece += chunk(self.flavour.piece("", self.tokens)) + chunk(b"")
        self.connection.send(piece)
        return self.sent < self.tokens


def serve(listener: socket.socket) -> None:
    """Answer until the process is ended."""
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    clients: dict[int, Client] = {}
    due: list[tuple[int, int, Client]] = []  # a heap: when the next token is, a number that decides ties, whose it is
    while True:
        pause = max(0.0, (due[0][0] - time.monotonic_ns()) / 1e9) if due else None
        for descriptor, _ in poll.poll(pause):
            if descriptor == listener.fileno():
                connection, _ = listener.accept()
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[connection.fileno()] = Client(connection)
                poll.register(connection, select.EPOLLIN)
                continue
            try:
                if clients[descriptor].read():
                    heapq.heappush(due, (time.monotonic_ns() + INTERVAL, descriptor, clients[descriptor]))
            except OSError:
                clients.pop(descriptor).connection.close()  # which takes it out of the epoll, too
        while due and due[0][0] <= time.monotonic_ns():
            when, number, client = heapq.heappop(due)
            try:
                if client.send_token():
                    heapq.heappush(due, (when + INTERVAL, number, client))
            except OSError:  # it left; or it does not take 300 bytes, and will miss them
                continue


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024) as listening:
        serve(listening)
