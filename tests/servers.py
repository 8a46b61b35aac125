"""A local server that misbehaves in many ways."""

import hashlib
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
    server.gone.set()
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
        self.data, self.requests, self.gone = data, [], threading.Event()

    def url(self, way, path="/gold166.zip"):
        return f"http://127.0.0.1:{self.server_port}/{way}{path}"

    def handle_error(self, *_):
        """Ignore killed clients."""


def fixed_answers(data):
    """Status, announced length and body, by the way to misbehave that needs no more."""
    half, page = data[: len(data) // 2], b"<html>Please log in</html>"
    inverted = bytes(byte ^ 255 for byte in data[100:101])
    return {
        "short": (200, len(half), half),
        "unannounced": (200, None, data),
        "huge": (200, 10**15, b"PK"),
        "altered": (200, len(data), data[:100] + inverted + data[101:]),
        "more": (200, len(data) + 1000, data),
        "page": (200, len(page), page),
        "missing": (404, 0, b""),
        "down": (503, 0, b""),
    }


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def head(self, status, length=None, **headers):
        self.send_response(status)
        self.send_header("ETag", f'"{self.digest}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, data):
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        _, way, path = unquote(self.path).split("/", 2)
        data = self.server.data
        data = data.get(path) if isinstance(data, dict) else data
        way = way if data is not None else "missing"
        data = data or b""
        self.digest = hashlib.sha256(data).hexdigest()
        asked = self.headers.get("Range")
        self.server.requests.append((way, asked))
        self.time = sum(way == before for before, _ in self.server.requests)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):
            if way in (answers := fixed_answers(data)):
                status, length, body = answers[way]
                self.head(status, length)
                self.send(body)
            else:
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
            self.send(data[start:][:send])

    def good(self, data, start):
        self.ranged(data, start)

    def drops(self, data, start):
        """Each connection breaks after a tenth of the archive."""
        self.ranged(data, start, len(data) // 10 + 1)

    def drops_once(self, data, _):
        """Knows no ranges; the first connection breaks."""
        self.head(200, len(data))
        self.send(data[: len(data) // 2 if self.time == 1 else None])

    def truncated(self, data, start):
        """Announces the whole and never sends more than half."""
        self.ranged(data, start, max(0, len(data) // 2 - start))

    def endless(self, *_):
        """Announces no length and never stops."""
        self.head(200)
        while True:
            self.send(bytes(1 << 20))

    def elsewhere(self, data, start):
        """Answers a request for the rest with another part."""
        if start:
            self.head(206, 10, Content_Range=f"bytes 0-9/{len(data)}")
            self.send(data[:10])
        else:
            self.ranged(data, 0, len(data) // 2)

    def trickle(self, data, start):
        self.head(200, len(data))
        for i in range(200):
            self.send(data[i : i + 1])
            if self.command == "HEAD" or self.server.gone.wait(0.02):
                return

    def silent(self, *_):
        self.server.gone.wait(2)

    def closes(self, *_):
        """Answers nothing."""

    def stalls(self, data, start):
        """Sends half, and then nothing more."""
        self.ranged(data, start, len(data) // 2)
        self.server.gone.wait(20)

    def slow(self, data, start):
        """Sends pieces, so that there is time for a kill."""
        self.ranged(data, start, 0)
        for first in range(start, len(data), 1 << 14):
            self.send(data[first : first + (1 << 14)])
            time.sleep(0.005)

    def busy(self, data, start):
        if self.time < 3:
            self.head(503, 0)
        else:
            self.ranged(data, start)

    def asks_to_wait(self, data, start):
        """Too many requests: come back in a second."""
        if self.time == 1:
            self.head(429, 0, Retry_After="1")
        else:
            self.ranged(data, start)

    def loop(self, *_):
        self.head(302, 0, Location=self.path)
