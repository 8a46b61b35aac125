"""A local server that misbehaves in many ways."""

import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from neurolib.data import download


@contextmanager
def serve(data):
    """Start a server of bytes, or of a mapping of paths to bytes."""
    server = Server(data)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def hurry(monkeypatch):
    """Shorten the waiting times."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "WINDOW", 0.2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Server(ThreadingHTTPServer):
    """Serves `data`, or its item for the path, in the way that the path's first part says."""

    daemon_threads = True

    def __init__(self, data):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.requests = data, []

    def url(self, way):
        return f"http://127.0.0.1:{self.server_port}/{way}/gold166.zip"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def head(self, status, length=None, **headers):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self):
        _, way, path = unquote(self.path).split("/", 2)
        data = self.server.data
        data = data.get(path) if isinstance(data, dict) else data
        way = way if data is not None else "missing"
        asked = self.headers.get("Range")
        self.server.requests.append((way, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, way)(data, start)

    def ranged(self, data, start, send=None):
        """Answer like a proper server, and send `send` bytes (all by default)."""
        if start >= len(data):
            self.head(416, 0, Content_Range=f"bytes */{len(data)}")
        elif start:
            told = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.head(206, len(data) - start, Content_Range=told)
        else:
            self.head(200, len(data))
        if start < len(data):
            self.wfile.write(data[start:][:send])

    def good(self, data, start):
        self.ranged(data, start)

    def drops(self, data, start):
        """Each connection breaks after a tenth of the archive."""
        self.ranged(data, start, len(data) // 10 + 1)

    def drops_once(self, data, _):
        """Knows no ranges; the first connection breaks."""
        first = sum(way == "drops_once" for way, _ in self.server.requests) == 1
        self.head(200, len(data))
        self.wfile.write(data[: len(data) // 2 if first else None])

    def truncated(self, data, start):
        """Announces the whole and never sends more than half."""
        self.ranged(data, start, max(0, len(data) // 2 - start))

    def short(self, data, _):
        """Announces and sends only half."""
        self.head(200, len(data) // 2)
        self.wfile.write(data[: len(data) // 2])

    def endless(self, *_):
        """Announces no length and never stops."""
        self.head(200)
        while True:
            self.wfile.write(bytes(1 << 20))

    def unannounced(self, data, _):
        self.head(200)
        self.wfile.write(data)

    def huge(self, *_):
        self.head(200, 10**15)
        self.wfile.write(b"PK")

    def altered(self, data, _):
        self.head(200, len(data))
        self.wfile.write(data[:100] + bytes([data[100] ^ 255]) + data[101:])

    def elsewhere(self, data, start):
        """Answers a request for the rest with another part."""
        if start:
            self.head(206, 10, Content_Range=f"bytes 0-9/{len(data)}")
            self.wfile.write(data[:10])
        else:
            self.ranged(data, 0, len(data) // 2)

    def trickle(self, data, start):
        self.head(200, len(data))
        for i in range(200):
            self.wfile.write(data[i : i + 1])
            time.sleep(0.02)

    def silent(self, *_):
        time.sleep(2)

    def page(self, *_):
        text = b"<html>Please log in</html>"
        self.head(200, len(text))
        self.wfile.write(text)

    def missing(self, *_):
        self.head(404, 0)

    def busy(self, data, start):
        if sum(way == "busy" for way, _ in self.server.requests) < 3:
            self.head(503, 0)
        else:
            self.ranged(data, start)

    def asks_to_wait(self, data, start):
        """Too many requests: come back in a second."""
        first = sum(way == "asks_to_wait" for way, _ in self.server.requests) == 1
        if first:
            self.head(429, 0, Retry_After="1")
        else:
            self.ranged(data, start)

    def down(self, *_):
        self.head(503, 0)

    def loop(self, *_):
        self.head(302, 0, Location=self.path)
