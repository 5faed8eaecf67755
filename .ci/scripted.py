#!/usr/bin/env python3
"""A scripted upstream for programs that ask for more than the demo has: it streams one sentence in three APIs.

python3 .ci/scripted.py PORT
"""

from __future__ import annotations

import http.server
import json
import sys
from typing import Any

TEXT = "This is the scripted upstream."
DELTA = {"index": 0, "output_index": 0, "content_index": 0, "item_id": "1"}


def events(path: str, model: str) -> list[dict[str, Any]]:
    """The answer in the API of the path: Anthropic's, OpenAI's newer one, or its older one."""
    if path == "/v1/messages":
        usage = {"input_tokens": 7, "output_tokens": 1}
        message = {"id": "1", "type": "message", "role": "assistant", "model": model, "content": [], "usage": usage}
        stop = {"stop_reason": "end_turn", "stop_sequence": None}
        return [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": TEXT}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 5}},
            {"type": "message_stop"},
        ]
    if path == "/v1/responses":
        content = [{"type": "output_text", "text": TEXT, "annotations": []}]
        item = {"type": "message", "id": "1", "role": "assistant", "status": "completed", "content": content}
        usage = {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12}
        response: dict[str, Any] = {"id": "1", "object": "response", "status": "completed", "model": model}
        response.update(output=[item], usage=usage)
        return [
            {"type": "response.created", "response": {**response, "status": "in_progress", "output": []}},
            {"type": "response.output_item.added", "item": {**item, "content": []}, **DELTA},
            {"type": "response.output_text.delta", "delta": TEXT, **DELTA},
            {"type": "response.output_item.done", "item": item, **DELTA},
            {"type": "response.completed", "response": response},
        ]
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": model}
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": TEXT}, None), ({}, "stop")]
    return [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in deltas]


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers every POST by a stream of events, which ends with the connection."""

    def do_POST(self) -> None:
        """Stream the answer."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in events(self.path.partition("?")[0], asked["model"]):
            name = f"event: {event['type']}\n" if "type" in event else ""
            self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Upstream).serve_forever()
