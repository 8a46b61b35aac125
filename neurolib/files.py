"""Atomic writing, locks, provenance and hashes of files."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from neurolib import __version__
from neurolib.errors import NeurolibError, SettingsError

try:
    import fcntl
except ImportError:  # Windows: no locks, and leftovers of killed processes stay
    fcntl = None

# Error codes for a full disk: no space left, over the quota, over the limit of one file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# NumPy's message for a full disk, which has no error code.
CUT_SHORT = re.compile(r"^\d+ requested and \d+ written$")
CHECKPOINT = "checkpoint.safetensors"  # in the folder of a run
# The network that comes with the course; data/neurite.md is its card.
SHIPPED = Path(__file__).resolve().parents[1] / "data" / "neurite.safetensors"
SHIPPED_NAME = "shipped"
# The first words of a result's provenance, and the line of an SWC with the hash of all others.
WRITTEN = "written by neurolib"
SEAL = re.compile(r"^# all other lines: sha256 (\w+)\n", re.MULTILINE)
# Seconds to wait for a folder's lock: the children of a killed process end soon after it.
PATIENCE = 5.0


def cache_folder() -> Path:
    """Folder in which downloads are kept: ``$NEUROLIB_CACHE`` or ``~/.cache/neurite-vit``."""
    return named_folder("NEUROLIB_CACHE") or Path.home() / ".cache" / "neurite-vit"


def named_folder(variable: str) -> Path | None:
    """The absolute folder that an environment variable names; None if it is not set.

    The variable is made absolute too, because notebooks run in another folder.
    """
    if not (value := os.environ.get(variable)):
        return None
    os.environ[variable] = os.path.abspath(value)
    return Path(os.environ[variable])


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; rename it to `path` when the block succeeds.

    The temporary path keeps the suffix, because writers choose their format by it. If the block
    raises, the temporary file (or folder) is removed and `path` is untouched. The next process
    that writes into this folder removes what a killed one left. A full disk, or a folder that
    cannot be written to, is a `SettingsError`.
    """
    path = Path(path)
    with workplace(path) as folder:
        temporary = folder / path.name
        with explain_full_disk(path):
            yield temporary
        if temporary.is_file():
            # Some writers deny read access to others; restore the user's default mode.
            (model := folder / ".mode").touch()
            os.chmod(temporary, stat.S_IMODE(model.stat().st_mode))
            model.unlink()
        for left in reversed(range(10)):  # another process may replace it at the same time
            try:
                _replace(path, temporary, folder / f".old{left}")
                break
            except OSError as error:
                if not left:
                    raise SettingsError(
                        f"{path}: cannot be replaced ({error.strerror}); choose another output name"
                    ) from None


def _replace(path: Path, new: Path, old: Path) -> None:
    """Rename `new` to `path`.

    Removing the old folder first could leave half an image if interrupted. So it is renamed to
    `old`, and renamed back if the replacement fails.
    """
    try:
        if new.is_dir() and path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):  # there is no old one, or already another new one
            os.replace(old, path)
        raise


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside `path`; remove it at the end, and those of killed processes.

    Strategy: each process locks its folder, and the system releases the lock when the process
    ends. So a folder of this machine that can be locked is abandoned.
    """
    # Other machines on the same disk may not see the locks, so the name includes the machine.
    machine = f"{zlib.crc32(platform.node().encode()):08x}"
    ours = re.compile(rf"\..+\.{machine}-\w{{8}}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.scandir(path.parent) as entries:
            left = [Path(entry.path) for entry in entries if ours.fullmatch(entry.name)]
        for folder in left:
            with contextlib.suppress(OSError):
                if (lock := _locked(folder)) is not None:
                    _remove(folder)
                    os.close(lock)
        prefix = f".{path.name[:40]}.{machine}-"
        while True:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
            lock = _locked(folder, wait=True)
            # Another process may have removed it as abandoned before it was locked.
            if folder.is_dir():
                break
            _unlock(lock)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot write here ({error.strerror}); choose a folder you may write to"
        ) from None
    try:
        yield folder
    finally:
        _remove(folder)
        _unlock(lock)


def _locked(path: Path, wait: bool = False) -> int | None:
    """Lock a folder; None if it is gone or locked by another process, or the disk has no locks."""
    if fcntl is None:
        return None
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(file)
        return None
    return file


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, even while threads of a failed writer still write into it."""
    for pause in (0, 0.01, 0.1, 1):
        time.sleep(pause)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


@contextmanager
def explain_full_disk(path: str | Path) -> Iterator[None]:
    """Turn any error that a full disk causes into a `SettingsError`."""
    try:
        yield
    except Exception as error:
        # Compiled libraries quote the system's message in errors of their own.
        message = str(error)
        reason = next((os.strerror(code) for code in FULL if os.strerror(code) in message), "")
        if not reason and isinstance(error, OSError) and CUT_SHORT.match(message):
            reason = os.strerror(errno.ENOSPC)
        if not reason or isinstance(error, SettingsError):
            raise
        raise SettingsError(
            f"{path}: cannot be written ({reason}); free some space, or choose another folder"
        ) from None


@contextmanager
def claim(path: str | Path, what: str | Path = "") -> Iterator[None]:
    """Hold the lock file `path` for `what` (by default its folder); remove it at the end.

    If another process holds it, this raises a `SettingsError`. The lock of a killed process is
    free for the next one.
    """
    path = Path(path)
    until = time.monotonic() + PATIENCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _hold(path)) is None:
            if time.monotonic() > until:
                raise SettingsError(
                    f"{what or path.parent}: another process uses it; wait until it ends, "
                    "stop it, or choose another folder"
                )
            time.sleep(0.1)
    except OSError as error:
        raise SettingsError(
            f"{path.parent}: cannot write here ({error.strerror}); choose a folder you may write to"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _hold(path: Path) -> int | None:
    """Open a lock file and lock it; None if another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # this file system has no locks
        return lock
    # Its previous owner may have removed it after we opened it.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    os.close(lock)
    return None


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint in `path` if that is the folder of a run, else `path` itself.

    `SHIPPED_NAME` stands for the network that comes with the course.
    """
    if str(path) == SHIPPED_NAME:
        return SHIPPED
    return Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, atomically; return the path.

    Bytes of file names that are not UTF-8 are written as ``\\udce4``.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def decode(raw: bytes) -> str:
    r"""Decode text in UTF-8, UTF-16 with a BOM, or a Western code page; line ends become \n."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = raw.decode("utf-16", errors="replace")
    else:
        # The last encoding that works wins. Vaa3D and Excel write the system's code page;
        # only Latin-1 has a character for every byte.
        for encoding in ("latin-1", "cp1252", "utf-8-sig"):
            with contextlib.suppress(UnicodeDecodeError):
                text = raw.decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin the message of any `NeurolibError` with the name of the file in question."""
    try:
        yield
    except NeurolibError as error:
        raise type(error)(f"{name}: {error}") from error.__cause__


def check_name(*paths: str | Path) -> None:
    """Refuse names that are not UTF-8, because notebooks and checkpoints cannot hold them."""
    for path in map(str, paths):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise SettingsError(
                f"{path}: the name has bytes that are not UTF-8, expected UTF-8 here; rename it, "
                "for example with convmv"
            ) from None


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(*arrays: np.ndarray) -> str:
    """Hash of the types, shapes and values of arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def text_key(text: str) -> str:
    """Hash of a text, in hexadecimal."""
    # File names need not be UTF-8.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ----------------------------------------------------------------------------------- results


def provenance(command: str, **facts: object) -> str:
    """How a result was made, one fact per line: version, inputs, parameters."""
    lines = [f"{WRITTEN} {__version__}: {command}", *(f"{k}: {v}" for k, v in facts.items())]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def is_result(path: Path) -> bool:
    """Whether neurolib wrote a file (or OME-Zarr), and nobody has changed it since.

    An SWC is recognised by the seal on its lines, an OME-Zarr by the seal on its metadata, if no
    other file in it is newer (`seal_zarr`), and a TIFF only by its Software field.
    """
    import tifffile

    try:
        if path.is_dir():
            head = path / "zarr.json"
            text, sealed = head.read_text(encoding="utf-8"), head.stat().st_mtime
            facts = json.loads(text)
            ours = facts["attributes"].pop("seal", "") == _seal(facts)
            later = (file for file in path.rglob("*") if file.stat().st_mtime > sealed)
            return WRITTEN in text and ours and next(later, None) is None
        if path.suffix.lower() == ".swc":
            return WRITTEN in path.read_text(encoding="utf-8") and is_sealed(path)
        with tifffile.TiffFile(path) as file:
            return file.pages.first.software.startswith(WRITTEN)
    except Exception:  # damaged files cause errors of all kinds
        return False


def seal_zarr(path: Path) -> None:
    """Mark an OME-Zarr as finished: files that change later are newer than its metadata.

    The metadata hold their own hash, because adding an attribute rewrites them.
    """
    head = path / "zarr.json"
    facts = json.loads(head.read_text(encoding="utf-8"))
    facts["attributes"]["seal"] = _seal(facts)
    head.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _seal(metadata: dict) -> str:
    return text_key(json.dumps(metadata, sort_keys=True))


def seal_text(text: str) -> str:
    """The line of an SWC that seals its other lines, `text`."""
    return f"# all other lines: sha256 {text_key(text)}\n"


def is_sealed(path: Path) -> bool:
    """Whether an SWC is still as `neurolib.swc.write_swc` wrote it, including its comments."""
    text = path.read_text(encoding="utf-8", errors="replace")
    seal = SEAL.search(text)
    return seal is not None and seal[1] == text_key(SEAL.sub("", text, count=1))


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], overwrite: bool = False) -> None:
    """Refuse outputs that would replace a user's file.

    No output may be, contain or lie inside an input or another output; links are followed. Files
    that neurolib did not write are replaced only with `overwrite`; a tree beside its image is
    never replaced.
    """
    # The paths seen so far by their own place, and by each folder that they lie in.
    taken: dict[object, Path] = {}
    around: dict[object, Path] = {}
    for number, path in enumerate((*inputs, *outputs)):
        places = _places(path)
        if number >= len(inputs):
            hits = (*map(taken.get, places), around.get(places[0]))
            if other := next(filter(None, hits), None):
                kind = "input" if other in inputs else "output"
                raise SettingsError(
                    f"{path}: is the {kind} {other}, or lies inside it; choose another name"
                )
        taken[places[0]] = path
        around |= dict.fromkeys(places[1:], path)
    for path in outputs:
        if not path.exists() or is_result(path):
            continue
        if any(_is_tree_of(path, image) for image in inputs):
            raise SettingsError(
                f"{path}: is the tree of the image beside it, not a result of neurolib; choose "
                "another name"
            )
        if not overwrite:
            raise SettingsError(
                f"{path}: exists, and may hold your own work; choose another name, or give "
                "--overwrite to replace it"
            )


def _places(path: Path) -> list[object]:
    """What is the same for all names of a path, and for those of each folder that it lies in."""

    def place(real: Path) -> object:
        try:
            return os.stat(real)[1:3]  # inode and device
        except OSError:
            return real

    real = path.resolve()
    return [place(real), *map(place, real.parents)]


def _is_tree_of(path: Path, image: Path) -> bool:
    first = [name.split(".")[0].casefold() for name in (path.name, image.name)]
    if path.suffix.lower() not in (".swc", ".eswc") or first[0] != first[1]:
        return False
    # Either may be a link to a file elsewhere.
    places = [{file.parent.resolve(), file.resolve().parent} for file in (path, image)]
    return bool(places[0] & places[1])
