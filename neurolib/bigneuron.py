"""The Janelia neurons of BigNeuron's gold166 release: download, check, unpack, split.

The release (Manubens-Gil et al., Nature Methods 2023) is one archive of 166 image stacks with
their gold-standard SWC files. It is too large to ship and is fetched once, into the cache. The
neurons of the paper are those of Janelia's FlyLight project, in the two folders
``..._janelia_flylight_part1`` and ``..._part2``, one folder per neuron.
"""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path, PurePosixPath

import requests
from tqdm.auto import tqdm
from urllib3.exceptions import HTTPError

from neurolib.datasets import Pair, Split, split_by_neuron
from neurolib.errors import DataError, SettingsError
from neurolib.files import atomic_path, claim, sha256, write_text
from neurolib.weights import cache_folder

URL = "https://github.com/BigNeuron/Data/releases/download/Gold166_v1/gold166.zip"
GROUP = "janelia_flylight"
# Best first, where a folder holds one image in several formats: the release's own goes first.
IMAGES = (".v3dpbd", ".v3draw", ".tif", ".tiff")
# Vaa3D names a proofread tree after its image and the time at which it was saved:
# "cell.v3dpbd_stamp_2015_06_15_18_06.swc", "cell.v3dpbd.ano_stamp_2015_06_17_11_23.swc".
GOLD = re.compile(r"_stamp_[\d_]+\.swc$", re.IGNORECASE)

# The archive is a few gigabytes, its Janelia part less than fifty when unpacked; what claims to
# be far larger is not it, and must not fill a disk.
MAX_ARCHIVE = 40 << 30
MAX_UNPACKED = 100 << 30
# A connection is given up when nothing comes for TIMEOUT seconds, or less than SLOWEST bytes per
# second over WINDOW seconds; the transfer when TRIES connections in a row brought nothing new.
TIMEOUT = 30.0
WINDOW = 30.0
SLOWEST = 4096
TRIES = 5
# Connections in all, so that one that drops after every few bytes comes to an end, too.
MAX_CONNECTIONS = 100
PAUSE = 1.0

# What zipfile raises for archives that are damaged, encrypted or packed in unknown ways.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)

# The paper's division of its 45 neurons: 38 for training, 3 for validation, 4 for testing.
VALIDATION, TEST = 3, 4


def fetch_janelia(
    url: str | None = None, sha256: str | None = None, cache: str | Path | None = None
) -> Path:
    """Folder of the Janelia image/SWC pairs, downloaded and unpacked at the first call.

    Parameters
    ----------
    url : str, optional
        Address of the archive; by default ``$NEUROLIB_BIGNEURON_URL``, else the release's own
        (`URL`), which the tests do not touch. Mirrors come and go: set the variable to one that
        works.
    sha256 : str, optional
        Hash that the archive must have; by default ``$NEUROLIB_BIGNEURON_SHA256``. The release
        publishes none. Without one, the hash of the first download is recorded in the cache and
        enforced at every later one, and a warning says so.
    cache : path, optional
        By default the folder ``bigneuron`` of `neurolib.weights.cache_folder`.

    Returns
    -------
    Path
        Folder with ``<name>.v3dpbd`` (or ``.v3draw``, ``.tif``) and ``<name>.swc`` for every
        neuron, for `neurolib.datasets.folder_pairs`. It is there whole or not at all.

    Raises
    ------
    DataError
        If the archive cannot be had, has another length or hash, is no archive, holds names that
        point outside it, is far larger than the release, or has no Janelia neuron.
    SettingsError
        If the cache cannot be written to.

    Notes
    -----
    A transfer that breaks off is resumed where it stopped, also by a later call.
    """
    url = url or os.environ.get("NEUROLIB_BIGNEURON_URL") or URL
    expected = (sha256 or os.environ.get("NEUROLIB_BIGNEURON_SHA256") or "").lower()
    if expected and not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise DataError(f"sha256 {expected!r}: expected 64 hexadecimal digits")
    cache = Path(cache) if cache else cache_folder() / "bigneuron"
    # Two addresses may hold two versions: each has a folder and a record of its own.
    key = hashlib.sha256(url.encode()).hexdigest()[:8]
    folder, record = cache / f"{GROUP}-{key}", cache / f"archive-{key}.json"
    known = _recorded(record)
    if expected and known and known != expected:
        raise DataError(
            f"{url}: the archive was downloaded before with sha256 {known[:16]}..., expected "
            f"{expected[:16]}...; delete {folder} and {record} to fetch it again"
        )
    archive, lock = cache / f"archive-{key}.zip", cache / f".{GROUP}-{key}.lock"
    # Killed after it was unpacked, a call leaves the archive.
    if folder.is_dir() and not archive.exists() and not lock.exists():
        return folder
    # Two that append to one part would spoil it.
    with claim(lock):
        if not folder.is_dir():
            _fetch(url, archive, folder, expected, known, record)
        archive.unlink(missing_ok=True)
    return folder


def _fetch(url: str, archive: Path, folder: Path, expected: str, known: str, record: Path) -> None:
    """Download, check and unpack the archive."""
    _download(url, archive)
    _verify(url, archive, expected or known, record)
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            _unpack(archive, temporary)
    except OSError as error:
        # The disk's fault, not the archive's: it is kept for the next call.
        raise SettingsError(f"{folder}: cannot be written ({error.strerror})") from None
    except (DataError, *DAMAGED) as error:
        # What is not the release must not be remembered as its first download.
        archive.unlink()
        if not expected and not known:
            record.unlink()
        if isinstance(error, DataError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DataError(f"{url}: the archive cannot be unpacked ({reason}); try again") from None


def janelia_split(pairs: list[Pair], seed: int = 0) -> Split:
    """Split the Janelia neurons: 4 for testing, 3 for validation, the others for training.

    With 45 neurons these are the paper's numbers (38/3/4). Its lists of neurons are not
    published: this draw is ours, made by `seed`, and not the paper's.

    Raises
    ------
    DataError
        If there are fewer than 8 neurons.
    """
    return split_by_neuron(pairs, test=TEST, validation=VALIDATION, seed=seed)


# --------------------------------------------------------------------------------- download


class _Interrupted(Exception):
    """The connection broke or was refused for now: worth another one."""


class _Stalled(_Interrupted):
    """The server sends so slowly that the archive would take days."""


def _download(url: str, archive: Path) -> None:
    """Bring the archive to `archive`; a part of it that is there already is resumed."""
    if archive.exists():
        return
    part = archive.with_suffix(".part")
    fruitless = connections = 0
    while fruitless < TRIES and connections < MAX_CONNECTIONS:
        time.sleep(PAUSE * fruitless)
        connections += 1
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            before = _size(part)
            _transfer(url, part)
            os.replace(part, archive)
            return
        except (_Interrupted, requests.ConnectionError, requests.Timeout, HTTPError) as error:
            # A connection that only trickles is fruitless, too, or it would never end.
            gained = _size(part) > before and not isinstance(error, _Stalled)
            fruitless = 0 if gained else fruitless + 1
            reason = _reason(error)
        except requests.RequestException as error:
            raise DataError(f"{url}: {_reason(error)}; check the address") from None
        except OSError as error:
            raise SettingsError(f"{part.parent}: cannot be written ({error.strerror})") from None
    raise DataError(
        f"{url}: the download stopped at {_size(part)} bytes after {connections} connections "
        f"({reason}); call again to go on, or set $NEUROLIB_BIGNEURON_URL to another address"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    # urllib3 nests its errors; the innermost says what happened.
    while error.args and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    error = getattr(error, "reason", None) or error
    return (str(error).splitlines() or [""])[0][-120:] or type(error).__name__


def _transfer(url: str, part: Path) -> None:
    """One connection: append to `part` until the archive is whole, or raise."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            # Nothing is left to send: the part is the whole, or of something else.
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise _Interrupted("the server has fewer bytes than were already here")
        if response.status_code in (429, 500, 502, 503, 504):
            raise _Interrupted(f"the server answered {response.status_code}")
        if response.status_code not in (200, 206):
            raise DataError(
                f"{url}: the server answered {response.status_code}; set "
                "$NEUROLIB_BIGNEURON_URL to an address that has the archive"
            )
        start, total = _extent(response, have)
        if total is not None and total > MAX_ARCHIVE:
            raise DataError(f"{url}: {total} bytes are not the release; check the address")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise DataError(
                f"{url}: {total} bytes do not fit on the disk of {part.parent} ({free} free)"
            )
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc="gold166") as bar,
        ):
            size = start
            # read1 returns what is there: a trickle must come back to the clock.
            window, since = 0, time.monotonic()
            while piece := response.raw.read1(1 << 20):
                size += len(piece)
                if size > (MAX_ARCHIVE if total is None else total):
                    raise DataError(f"{url}: more bytes than announced; check the address")
                file.write(piece)
                bar.update(len(piece))
                window += len(piece)
                elapsed = time.monotonic() - since
                if elapsed > WINDOW:
                    if window < SLOWEST * elapsed:
                        raise _Stalled(f"less than {SLOWEST} bytes per second")
                    window, since = 0, time.monotonic()
    if total is not None and size < total:
        raise _Interrupted(f"the connection closed at {size} of {total} bytes")


def _extent(response: requests.Response, have: int) -> tuple[int, int | None]:
    """Where the body of a response begins in the archive, and the archive's length if told."""
    length = response.headers.get("Content-Length", "")
    if response.status_code == 200:
        return 0, int(length) if length.isdigit() else None
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not told or int(told[1]) != have:
        raise DataError(
            f"{response.url}: asked for the bytes from {have} on, the server sent "
            f"{response.headers.get('Content-Range', 'others')!r}; use another address"
        )
    return have, None if told[2] == "*" else int(told[2])


def _recorded(record: Path) -> str:
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{record}: not a readable record; delete it and call again") from None


def _verify(url: str, archive: Path, expected: str, record: Path) -> None:
    """Compare the archive's hash with the one given or recorded; record it if there is none."""
    found = sha256(archive)
    if expected and found != expected:
        archive.unlink()
        raise DataError(
            f"{url}: the archive has sha256 {found}, expected {expected}; it was deleted: try "
            "again, or check the address"
        )
    if not expected:
        warnings.warn(
            f"{url}: no hash of this archive is known; sha256 {found} of this first download is "
            f"recorded in {record} and enforced from now on",
            stacklevel=4,
        )
    facts = {"url": url, "sha256": found, "bytes": archive.stat().st_size}
    write_text(record, json.dumps(facts, indent=1))


# ----------------------------------------------------------------------------------- unpack


def _unpack(archive: Path, folder: Path) -> None:
    """Write the Janelia pairs of the archive into `folder`, under names of our own."""
    with zipfile.ZipFile(archive) as opened:
        members = [member for member in opened.infolist() if not member.is_dir()]
        for member in members:
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                raise DataError(
                    f"{archive.name}: the member {member.filename[:80]!r} points outside the "
                    "archive; this is not the release"
                )
        pairs, unpaired = _pairs(members)
        if not pairs:
            raise DataError(
                f"{archive.name}: no image with a gold SWC in a folder named ...{GROUP}...; this "
                "is not the gold166 release"
            )
        total = sum(member.file_size for pair in pairs.values() for member in pair)
        if total > MAX_UNPACKED:
            raise DataError(f"{archive.name}: {total} bytes unpacked are not the release")
        if total > shutil.disk_usage(folder).free:
            raise DataError(f"{folder.parent}: {total} bytes unpacked do not fit on the disk")
        if unpaired:
            warnings.warn(
                f"{archive.name}: {len(unpaired)} images have no SWC, or several that may be "
                f"the gold standard, and are left out: {', '.join(unpaired[:3])}",
                stacklevel=5,
            )
        for name, (image, tree) in tqdm(sorted(pairs.items()), desc="unpacking"):
            suffix = PurePosixPath(image.filename).suffix.lower()
            for member, target in ((image, f"{name}{suffix}"), (tree, f"{name}.swc")):
                # zipfile stops at the size that was summed up above, and checks the CRC.
                with opened.open(member) as source, open(folder / target, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)


def _pairs(
    members: list[zipfile.ZipInfo],
) -> tuple[dict[str, tuple[zipfile.ZipInfo, zipfile.ZipInfo]], list[str]]:
    """Image and gold SWC of each Janelia neuron by name; names of images without a sure SWC."""
    folders: dict[PurePosixPath, list[tuple[str, zipfile.ZipInfo]]] = defaultdict(list)
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        hidden = path.name.startswith(".") or "__MACOSX" in path.parts
        if GROUP in str(path.parent).lower() and not hidden:
            folders[path.parent].append((path.name, member))
    pairs, unpaired = {}, []
    for folder in sorted(folders):
        images: dict[str, tuple[int, zipfile.ZipInfo]] = {}
        trees = []
        for name, member in folders[folder]:
            stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix.lower()
            if suffix in IMAGES:
                rank = IMAGES.index(suffix)
                if stem not in images or rank < images[stem][0]:
                    images[stem] = rank, member
            elif suffix == ".swc":
                trees.append((name, member))
        for stem, (_, image) in sorted(images.items()):
            # Alone in its folder an image may have a tree of any name.
            own = [t for t in trees if len(images) == 1 or _belongs(t[0], stem)]
            gold = [t for t in own if GOLD.search(t[0])] or own
            name = re.sub(r"[^\w.+-]", "_", stem)
            if len(gold) != 1:
                unpaired.append(name)
            else:
                # The same image in two parts is one neuron: the first is kept.
                pairs.setdefault(name, (image, gold[0][1]))
    return pairs, unpaired


def _belongs(tree: str, stem: str) -> bool:
    """Whether an SWC is named after an image: "cell_1" is not the image of "cell_10.swc"."""
    return tree.startswith(stem) and tree[len(stem) : len(stem) + 1] in (".", "_")
