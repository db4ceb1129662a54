"""A local HTTP server that answers JSON, for tests that need someone on the other side."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Take = Callable[[str, Any, bytes], tuple[int, Any]]


def serve(take: Take) -> ThreadingHTTPServer:
    """Starts one; take(path, headers, body) gives status and content, one request at a time. Ends with ``shutdown()``.

    content: written as JSON; bytes go out as they are, for a page of HTML.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = self.headers["Content-Length"]
            self.reply(self.rfile.read(int(size)) if size else b"".join(self.chunks()))

        def do_GET(self) -> None:
            self.reply(b"")

        def chunks(self) -> Iterator[bytes]:
            while length := int(self.rfile.readline().strip() or b"0", 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()

        def reply(self, body: bytes) -> None:
            with lock:
                status, content = take(self.path, self.headers, body)
            page = isinstance(content, bytes)
            data = content if page else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if page else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def url(server: ThreadingHTTPServer) -> str:
    """Its address."""
    return f"http://127.0.0.1:{server.server_port}"
