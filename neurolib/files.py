"""Files written whole or not at all, and their hashes."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neurolib.errors import SettingsError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it to `path` when the block succeeds.

    The temporary name keeps the suffix of `path`, since writers choose their format by it.
    If the block raises, the temporary file (or folder) is removed and `path` is untouched.

    Raises
    ------
    SettingsError
        If the folder of `path` cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.parent)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot write here ({error.strerror}); choose a folder you may write to"
        ) from None
    temporary = Path(folder) / path.name
    try:
        yield temporary
        try:
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
        except OSError as error:
            raise SettingsError(
                f"{path}: cannot be replaced ({error.strerror}); choose another output name"
            ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, atomically; return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
