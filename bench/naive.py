"""The gateway that one writes in an afternoon: `naive.py PORT UPSTREAM-PORT KEY CERT CERT-KEY LOG`.

It is here to show what the standard library's http.server and http.client cost where nothing is tuned: a new
connection to the upstream and an opened log file per request, TLS handshakes in the thread that accepts, Nagle's
algorithm left on, which holds a small answer's end back for the 40 ms of a delayed ACK.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, UPSTREAM, KEY, CERT, CERT_KEY, LOG = sys.argv[1:]
NOT_PASSED_ON = {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "x-api-key"}


class Handler(BaseHTTPRequestHandler):
    """One client's connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Check the key, forward, log."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("X-Api-Key") == KEY:
            self.forward(body)
        else:
            self.send_error(403)

    do_POST = do_GET

    def forward(self, body: bytes) -> None:
        """Pass on the request, then the answer in pieces as they come."""
        upstream = http.client.HTTPConnection("127.0.0.1", int(UPSTREAM))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in NOT_PASSED_ON}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", ""))
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while piece := answer.read1(65536):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")
        upstream.close()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """A line of JSON, for send_response and send_error."""
        with Path(LOG).open("a", encoding="utf-8") as file:
            line = {"time": time.time(), "path": self.path, "status": code, "client": self.client_address[0]}
            file.write(json.dumps(line) + "\n")


server = ThreadingHTTPServer(("127.0.0.1", int(PORT)), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(CERT, CERT_KEY)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
