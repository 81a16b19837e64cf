"""A Hugging Face hub on the loopback interface, as far as fetching files goes, that can be told to misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Hub:
    """files: path -> content. cut: bytes after which an answer breaks off, taken off the list one answer at a time.
    announced: path -> the sha256 to announce instead of the true one. asked: (method, path, Range header) of every request.
    refuses_head: answers GET alone."""

    address: str
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    cut: list[int] = dataclasses.field(default_factory=list)
    announced: dict[str, str] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    refuses_head: bool = False

    def put(self, repository: str, file: str, content: bytes, *, revision: str = "main") -> None:
        self.files[f"/{repository}/resolve/{revision}/{file}"] = content

    def fetched(self) -> list[tuple[str, str | None]]:
        """(path, Range header) of every GET."""
        return [(path, span) for method, path, span in self.asked if method == "GET"]


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        span = self.headers.get("Range")
        hub.asked.append((self.command, self.path, span))
        content = hub.files.get(self.path)
        refused = hub.refuses_head and not with_content
        if content is None or refused:
            self.send_response(405 if refused else 404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span else 0  # type: ignore[index]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        digest = hub.announced.get(self.path, hashlib.sha256(content).hexdigest())
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_content:
            return
        body = content[start:]
        if hub.cut and not self.path.endswith(".json"):
            self.wfile.write(body[: hub.cut.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""
