"""Download a file over HTTP: resume where it stopped, limit time and size, check the hash."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import requests
from tqdm.auto import tqdm
from urllib3.exceptions import HTTPError

from neurolib.errors import DataError, SettingsError
from neurolib.files import sha256 as hash_of

# A connection is dropped if nothing arrives for TIMEOUT seconds, or less than SLOWEST bytes per
# second over WINDOW seconds. After TRIES connections in a row without progress, the transfer fails.
TIMEOUT = 30.0
WINDOW = 30.0
SLOWEST = 4096
TRIES = 5
# Limits a transfer whose connections each drop after a few bytes.
MAX_CONNECTIONS = 100
PAUSE = 1.0
# The longest that a server may make us wait between two connections, in seconds.
MAX_WAIT = 60.0
# Smaller files need no progress bar.
SMALL = 16 << 20
# Keeps the connection open between files.
SESSION = requests.Session()


class _Interrupted(Exception):
    """The connection broke or was refused; try another one after `wait` seconds."""

    def __init__(self, reason: str, wait: str = ""):
        super().__init__(reason)
        self.wait = min(float(wait), MAX_WAIT) if wait.isdigit() else 0.0


class _Stalled(_Interrupted):
    """The server is too slow."""


def download(url: str, path: Path, sha256: str, limit: int, variable: str) -> None:
    """Download a file to `path`, with the right hash or not at all.

    An interrupted transfer leaves ``.part`` beside it, and the next call resumes there. A file
    that is already at `path` is only checked. The hash is empty if unknown, `limit` is the largest
    number of bytes, and `variable` an environment variable that sets another address.
    """
    if not path.exists():
        _transfer_all(url, path, limit, variable)
    if sha256 and (digest := hash_of(path)) != sha256:
        path.unlink()
        raise DataError(
            f"{url}: the download has sha256 {digest}, expected {sha256}; it was deleted: try "
            f"again, or set ${variable} to another address"
        )


def _transfer_all(url: str, path: Path, limit: int, variable: str) -> None:
    """Reconnect until the file is complete."""
    part = path.with_suffix(".part")
    fruitless, connections, wait = 0, 0, 0.0
    while fruitless < TRIES and connections < MAX_CONNECTIONS:
        time.sleep(max(PAUSE * fruitless, wait))
        connections += 1
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            before = _size(part)
            _transfer(url, part, limit, variable)
            os.replace(part, path)
            return
        except (_Interrupted, requests.ConnectionError, requests.Timeout, HTTPError) as error:
            # A connection that only trickles counts as fruitless, or it would never end.
            gained = _size(part) > before and not isinstance(error, _Stalled)
            fruitless = 0 if gained else fruitless + 1
            reason, wait = _reason(error), getattr(error, "wait", 0.0)
        except requests.RequestException as error:
            raise DataError(f"{url}: {_reason(error)}; check the address") from None
        except OSError as error:
            raise SettingsError(f"{part.parent}: cannot be written ({error.strerror})") from None
    raise DataError(
        f"{url}: the download stopped at {_size(part)} bytes after {connections} connections "
        f"({reason}); run it again to resume, set ${variable} to another address, or "
        "$NEUROLIB_DATA to a folder of finished pairs"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    # urllib3 nests its errors; the innermost says what happened.
    while error.args and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    error = getattr(error, "reason", None) or error
    return (str(error).splitlines() or [""])[0][-120:] or type(error).__name__


def _transfer(url: str, part: Path, limit: int, variable: str) -> None:
    """Append to `part` over one connection until the file is complete, or raise."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with SESSION.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            # Nothing is left to send: the part is complete, or belongs to another file.
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise _Interrupted("the server's file is shorter than the part already here")
        if response.status_code in (429, 500, 502, 503, 504):
            wait = response.headers.get("Retry-After", "")
            raise _Interrupted(f"the server answered {response.status_code}", wait)
        if response.status_code not in (200, 206):
            raise DataError(
                f"{url}: server answered {response.status_code}; set ${variable} to another address"
            )
        sent, start = response.headers.get("Content-Range", "others"), 0
        length = response.headers.get("Content-Length", "")
        if response.status_code == 206:
            content = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", sent)
            if not content or int(content[1]) != have:
                raise DataError(
                    f"{url}: asked for the bytes from {have} on, but got {sent!r}; set "
                    f"${variable} to another address"
                )
            start, length = have, content[2]
        total = int(length) if length.isdigit() else None
        if total is not None and total > limit:
            raise DataError(f"{url}: {total} bytes, expected {limit} at most; check the address")
        if total is not None and total - start > (free := shutil.disk_usage(part.parent).free):
            raise DataError(f"{url}: {total} bytes do not fit into {part.parent} ({free} free)")
        bar = {"total": total, "initial": start, "unit": "B", "unit_scale": True, "desc": part.stem}
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(**bar, disable=limit <= SMALL) as progress,
        ):
            size = start
            # read1 returns what has arrived, so that a trickle does not escape the clock.
            window, since = 0, time.monotonic()
            while piece := response.raw.read1(1 << 20):
                size += len(piece)
                if size > (limit if total is None else total):
                    raise DataError(f"{url}: more bytes than announced; check the address")
                file.write(piece)
                progress.update(len(piece))
                window += len(piece)
                elapsed = time.monotonic() - since
                if elapsed > WINDOW:
                    if window < SLOWEST * elapsed:
                        raise _Stalled(f"less than {SLOWEST} bytes per second")
                    window, since = 0, time.monotonic()
    if total is not None and size < total:
        raise _Interrupted(f"the connection closed at {size} of {total} bytes")


def read_record(path: Path) -> dict[str, str]:
    """Hashes recorded beside downloads; empty without a record."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError):
        raise DataError(f"{path}: not a readable record; delete it and try again") from None
