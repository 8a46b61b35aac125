"""Files written whole or not at all, folders that one process has to itself, and hashes."""

import contextlib
import errno
import hashlib
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
from neurolib.errors import SettingsError

try:
    import fcntl
except ImportError:  # Windows: what killed processes leave stays, and nobody is kept out
    fcntl = None

# What a disk says that takes no more: full, over a quota, over the limit of one file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# NumPy's own words for it, without a number.
CUT_SHORT = re.compile(r"^\d+ requested and \d+ written$")
CHECKPOINT = "checkpoint.safetensors"  # in the folder of a run
# The network that comes with the course; data/neurite.md is its card.
SHIPPED = Path(__file__).resolve().parents[1] / "data" / "neurite.safetensors"
# How the provenance of our results begins, and what seals the nodes of an SWC.
WRITTEN = "written by neurolib"
SEAL = re.compile(r"^# nodes: sha256 (\w+)$", re.MULTILINE)
# Seconds in which a folder must come free: what a killed process has started ends soon after it.
PATIENCE = 5.0


def cache_folder() -> Path:
    """Folder in which downloads are kept: ``$NEUROLIB_CACHE`` or ``~/.cache/neurite-vit``."""
    return named_folder("NEUROLIB_CACHE") or Path.home() / ".cache" / "neurite-vit"


def named_folder(variable: str) -> Path | None:
    """The folder that an environment variable names, absolute; None if it is not set.

    The variable is made absolute, too: notebooks run in a folder of their own, and a relative
    name must mean the same to them.
    """
    if not (value := os.environ.get(variable)):
        return None
    os.environ[variable] = os.path.abspath(value)
    return Path(os.environ[variable])


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it to `path` when the block succeeds.

    The temporary name keeps the suffix of `path`, since writers choose their format by it.
    If the block raises, the temporary file (or folder) is removed and `path` is untouched. What
    a killed process leaves is removed by the next one that writes into the same folder.

    Raises
    ------
    SettingsError
        If the folder of `path` cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    with workplace(path) as folder:
        temporary = folder / path.name
        with explain_full_disk(path):
            yield temporary
        if temporary.is_file():
            # Some writers let nobody else read; a file of ours is like any other of this user.
            (folder / ".mode").touch()
            os.chmod(temporary, stat.S_IMODE((folder / ".mode").stat().st_mode))
        try:
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
        except OSError as error:
            raise SettingsError(
                f"{path}: cannot be replaced ({error.strerror}); choose another output name"
            ) from None


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside `path`, removed at the end; remove those of killed processes.

    Strategy: a process locks its folder, and the system frees the locks of a process that ends,
    however it ends. So a folder of this machine that can be locked is nobody's.

    Raises
    ------
    SettingsError
        If the folder of `path` cannot be made or written to.
    """
    # Locks may not reach other machines on the same disk: the name says whose folder it is.
    machine = f"{zlib.crc32(platform.node().encode()):08x}"
    ours = re.compile(rf"\..+\.{machine}-\w{{8}}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.scandir(path.parent) as entries:
            left = [Path(entry.path) for entry in entries if ours.fullmatch(entry.name)]
        for folder in left:
            _remove_if_left(folder)
        prefix = f".{path.name[:40]}.{machine}-"
        while True:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
            lock = _locked(folder, wait=True)
            # Before it was locked, it may have been taken for left behind.
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
    """Lock a folder; None if it is gone, another process has it, or the disk knows no locks."""
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


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = _locked(folder)
        if lock is not None:
            _remove(folder)
            _unlock(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, also while threads of a writer that has failed still put files into it."""
    for pause in (0, 0.01, 0.1, 1):
        time.sleep(pause)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


@contextmanager
def explain_full_disk(path: str | Path) -> Iterator[None]:
    """Turn what the writers of all formats raise on a full disk into one `SettingsError`."""
    try:
        yield
    except Exception as error:
        # Libraries in other languages repeat the system's words in errors of their own.
        said = str(error)
        reason = next((os.strerror(code) for code in FULL if os.strerror(code) in said), "")
        if not reason and isinstance(error, OSError) and CUT_SHORT.match(said):
            reason = os.strerror(errno.ENOSPC)
        if not reason or isinstance(error, SettingsError):
            raise
        raise SettingsError(
            f"{path}: cannot be written ({reason}); make room, or choose another place"
        ) from None


@contextmanager
def claim(path: str | Path, what: str | Path = "") -> Iterator[None]:
    """Hold the lock file `path`, which stands for `what`, and remove it at the end.

    `what` is its folder unless given. The system frees the lock of a process that is killed; the
    next one takes over the file.

    Raises
    ------
    SettingsError
        If another process holds it, or its folder cannot be made or written to.
    """
    path = Path(path)
    until = time.monotonic() + PATIENCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _hold(path)) is None:
            if time.monotonic() > until:
                raise SettingsError(
                    f"{what or path.parent}: another process is at work here; wait for it, end "
                    "it, or choose another place"
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
    """Open a lock file and lock it; None if another process has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who had it before may have removed it since it was opened.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except BlockingIOError:
        pass
    except OSError:  # a file system without locks keeps nobody out
        return lock
    os.close(lock)
    return None


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint of a run, where `path` is a run's folder; else `path`."""
    return Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, atomically; return the path.

    Bytes of file names that are no UTF-8 are written as ``\\udce4``.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def decode(raw: bytes) -> str:
    r"""Text of a file of the user's: UTF-8, UTF-16 with its mark, or a Western code page.

    Line ends become ``\\n``.
    """
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = raw.decode("utf-16", errors="replace")
    else:
        # Vaa3D and Excel write names in whatever the system's code page was; of those, Latin-1
        # alone has a letter for every byte.
        for encoding in ("utf-8-sig", "cp1252", "latin-1"):
            try:
                text = raw.decode(encoding)
                break
            except UnicodeDecodeError:
                continue
    return text.replace("\r\n", "\n").replace("\r", "\n")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def content_key(*arrays: np.ndarray) -> str:
    """Hash of the types, shapes and values of arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------- results


def provenance(command: str, **facts: object) -> str:
    """What a result was made with, one fact a line: version, inputs, parameters."""
    lines = [f"{WRITTEN} {__version__}: {command}", *(f"{k}: {v}" for k, v in facts.items())]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def is_result(path: Path) -> bool:
    """Whether a file (or OME-Zarr) is a result of a command of ours, as it was written.

    An SWC that was corrected by hand since, and all that another program saved, is none.
    """
    import tifffile

    try:
        if path.is_dir():
            return WRITTEN in (path / "zarr.json").read_text(encoding="utf-8")
        if path.suffix.lower() == ".swc":
            return WRITTEN in path.read_text(encoding="utf-8") and is_sealed(path)
        with tifffile.TiffFile(path) as file:
            return file.pages.first.software.startswith(WRITTEN)
    except (OSError, ValueError, tifffile.TiffFileError):
        return False


def is_sealed(path: Path) -> bool:
    """Whether the nodes of an SWC are those that `neurolib.swc.write_swc` wrote."""
    text = path.read_text(encoding="utf-8", errors="replace")
    seal = SEAL.search(text)
    nodes = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    return seal is not None and seal[1] == seal_of(nodes)


def seal_of(nodes: str) -> str:
    """The hash of the lines of an SWC that are not its head."""
    return hashlib.sha256(nodes.encode()).hexdigest()[:16]


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], overwrite: bool = False) -> None:
    """Refuse outputs that would replace something of the user's, before any work is done.

    Links are followed. A tree beside an image of the same name is taken for the image's own, and
    never replaced.

    Raises
    ------
    SettingsError
        If an output is an input or another output, lies inside one, or holds one; or exists, is
        no result of ours, and `overwrite` is not set.
    """
    for number, path in enumerate(outputs):
        for other in (*inputs, *outputs[:number]):
            if _overlap(path, other):
                kind = "input" if other in inputs else "output"
                raise SettingsError(
                    f"{path}: is, or lies inside, the {kind} {other}; choose another name"
                )
        if not path.exists() or is_result(path):
            continue
        if any(_is_tree_of(path, image) for image in inputs):
            raise SettingsError(
                f"{path}: the tree of the image beside it, and no result of neurolib; choose "
                "another name"
            )
        if not overwrite:
            raise SettingsError(
                f"{path}: exists, and is not as neurolib wrote it; choose another name, or give "
                "--overwrite to replace it"
            )


def _overlap(one: Path, other: Path) -> bool:
    """Whether two paths are the same file, or one lies in the other."""

    def same(a: Path, b: Path) -> bool:
        try:
            return os.path.samefile(a, b)
        except OSError:
            return a.resolve() == b.resolve()

    pairs = ((one, other), (other, one))
    return any(same(a, b) for inner, b in pairs for a in (inner, *inner.resolve().parents))


def _is_tree_of(path: Path, image: Path) -> bool:
    first = [name.split(".")[0].casefold() for name in (path.name, image.name)]
    is_tree = path.suffix.lower() in (".swc", ".eswc")
    return is_tree and first[0] == first[1] and path.resolve().parent == image.resolve().parent
