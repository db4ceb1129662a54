"""A local HTTP server that answers JSON or bytes, for tests that need someone on the other side."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Take = Callable[[str, Any, bytes], tuple[Any, ...]]


def serve(take: Take) -> ThreadingHTTPServer:
    """Starts one; take(path, headers, body) gives status and content, one request at a time. Ends with ``shutdown()``.

    Content that is bytes goes out as it is, with the headers that take may give as a third.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = self.headers["Content-Length"]
            self.reply(self.rfile.read(int(size)) if size else b"".join(self.chunks()))

        def do_GET(self) -> None:
            self.reply(b"")

        do_HEAD = do_GET

        def chunks(self) -> Iterator[bytes]:
            while length := int(self.rfile.readline().strip() or b"0", 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()

        def reply(self, body: bytes) -> None:
            with lock:
                status, content, *more = take(self.path, self.headers, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (more[0] if more else {"Content-Type": "application/json"}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)

        def log_message(self, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def url(server: ThreadingHTTPServer) -> str:
    """Its address."""
    return f"http://127.0.0.1:{server.server_port}"
