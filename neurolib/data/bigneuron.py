"""The Janelia neurons of BigNeuron's gold166 release: download, check, unpack.

The release (Manubens-Gil et al., Nature Methods 2023) is one archive of 166 image stacks with
their gold-standard SWC files. It is too large to ship and is fetched once, into the cache. The
paper uses the neurons of Janelia's FlyLight project, which are in the two folders
``..._janelia_flylight_part1`` and ``..._part2``; each neuron has its own folder there.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from neurolib import files
from neurolib.data.download import download, read_record
from neurolib.errors import DataError, NeurolibWarning, SettingsError

URL = "https://github.com/BigNeuron/Data/releases/download/Gold166_v1/gold166.zip"
VARIABLE = "NEUROLIB_BIGNEURON_URL"
GROUP = "janelia_flylight"
# In order of preference, for a folder that holds one image in several formats.
IMAGES = (".v3dpbd", ".v3draw", ".tif", ".tiff")
# Vaa3D names a proofread tree after its image and the time of saving:
# "cell.v3dpbd_stamp_2015_06_15_18_06.swc", "cell.v3dpbd.ano_stamp_2015_06_17_11_23.swc".
GOLD = re.compile(r"_stamp_[\d_]+\.swc$", re.IGNORECASE)
# The archive is a few gigabytes, and its Janelia part under fifty once unpacked. Anything much
# larger must not fill a disk.
MAX_ARCHIVE = 40 << 30
MAX_UNPACKED = 100 << 30
# Errors that zipfile raises for archives that are damaged, encrypted or packed in unknown ways.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def fetch_janelia() -> Path:
    """Folder of the Janelia image/SWC pairs, downloaded and unpacked on the first call.

    The archive comes from ``$NEUROLIB_BIGNEURON_URL``, by default the release's address (`URL`),
    and must have the hash ``$NEUROLIB_BIGNEURON_SHA256``. The release publishes no hash, so by
    default the hash of the first download is recorded in the cache and enforced from then on.

    Returns
    -------
    Path
        Folder with an image and ``<name>.swc`` for every neuron, created atomically.
    """
    url = os.environ.get(VARIABLE) or URL
    expected = os.environ.get("NEUROLIB_BIGNEURON_SHA256", "").lower()
    if not re.fullmatch(r"([0-9a-f]{64})?", expected):
        raise DataError(f"sha256 {expected!r}: expected 64 hexadecimal digits")
    # Two addresses may hold two versions, so each has its own folder and record.
    cache, key = files.cache_folder() / "bigneuron", hashlib.sha256(url.encode()).hexdigest()[:8]
    folder, record = cache / f"{GROUP}-{key}", cache / f"archive-{key}.json"
    known = read_record(record).get("sha256", "")
    if expected and known and known != expected:
        raise DataError(
            f"{url}: the archive was downloaded before with sha256 {known[:16]}..., expected "
            f"{expected[:16]}...; delete {folder} and {record} to fetch it again"
        )
    archive, lock = cache / f"archive-{key}.zip", cache / f".{GROUP}-{key}.lock"
    # A call killed after unpacking leaves the archive behind.
    if folder.is_dir() and not archive.exists() and not lock.exists():
        return folder
    with files.claim(lock):
        if not folder.is_dir():
            _fetch(url, archive, folder, expected or known, record)
        archive.unlink(missing_ok=True)
    return folder


def _fetch(url: str, archive: Path, folder: Path, expected: str, record: Path) -> None:
    """Download, check and unpack the archive."""
    download(url, archive, expected, MAX_ARCHIVE, VARIABLE)
    digest = expected or files.sha256(archive)
    if not expected:
        warnings.warn(
            f"{url}: no hash of this archive is known; sha256 {digest} of this first download is "
            f"recorded in {record} and enforced from now on",
            NeurolibWarning,
            stacklevel=3,
        )
    files.write_text(record, json.dumps({"url": url, "sha256": digest}, indent=1))
    try:
        with files.atomic_path(folder) as temporary:
            temporary.mkdir()
            _unpack(archive, temporary)
    except OSError as error:
        # The disk is to blame, so keep the archive for the next call.
        raise SettingsError(f"{folder}: cannot be written ({error.strerror})") from None
    except (DataError, *DAMAGED) as error:
        # This is not the release, so its hash must not be remembered.
        archive.unlink()
        if not expected:
            record.unlink()
        if isinstance(error, DataError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DataError(f"{url}: the archive cannot be unpacked ({reason}); try again") from None


def _unpack(archive: Path, folder: Path) -> None:
    """Write the Janelia pairs of the archive into `folder`, renamed."""
    with zipfile.ZipFile(archive) as opened:
        members = [member for member in opened.infolist() if not member.is_dir()]
        for member in members:
            path = _path(member)
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
        if total > min(MAX_UNPACKED, shutil.disk_usage(folder).free):
            raise DataError(
                f"{archive.name}: unpacked, its pairs have {total} bytes, too many for this disk "
                "or for the release; make room, or check the address"
            )
        if unpaired:
            warnings.warn(
                f"{archive.name}: {len(unpaired)} images have no SWC, or several that may be "
                f"the gold standard, and are left out: {', '.join(unpaired[:3])}",
                NeurolibWarning,
                stacklevel=4,
            )
        for name, (image, tree) in tqdm(sorted(pairs.items()), desc="unpacking"):
            for member, suffix in ((image, _path(image).suffix.lower()), (tree, ".swc")):
                # zipfile stops at the size added up above, and checks the CRC.
                with opened.open(member) as source, open(folder / f"{name}{suffix}", "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)


def _path(member: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(member.filename.replace("\\", "/"))


def _pairs(members: list[zipfile.ZipInfo]) -> tuple[dict[str, tuple], list[str]]:
    """Image and gold SWC of each Janelia neuron, by name; names of images without a clear SWC."""
    folders: dict[PurePosixPath, list[zipfile.ZipInfo]] = defaultdict(list)
    for member in members:
        path = _path(member)
        hidden = path.name.startswith(".") or "__MACOSX" in path.parts
        if GROUP in str(path.parent).lower() and not hidden:
            folders[path.parent].append(member)
    pairs, unpaired = {}, []
    for _, inside in sorted(folders.items()):
        # If an image comes in several formats, the last one here wins: the first of IMAGES.
        images = {
            _path(m).stem: m
            for suffix in reversed(IMAGES)
            for m in inside
            if _path(m).suffix.lower() == suffix
        }
        trees = [m for m in inside if _path(m).suffix.lower() == ".swc"]
        for stem, image in sorted(images.items()):
            # The only image of a folder may have a tree of any name; otherwise "cell_10.swc" must
            # not match "cell_1".
            named = (f"{stem}.", f"{stem}_")
            own = [t for t in trees if len(images) == 1 or _path(t).name.startswith(named)]
            gold = [t for t in own if GOLD.search(_path(t).name)] or own
            name = re.sub(r"[^\w.+-]", "_", stem)
            if len(gold) != 1:
                unpaired.append(name)
            else:
                # If both parts have the same image, the first one wins.
                pairs.setdefault(name, (image, gold[0]))
    return pairs, unpaired
