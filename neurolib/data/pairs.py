"""Pair images with trees, and find out which neuron they show."""

import csv
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neurolib.errors import DataError, NeurolibWarning
from neurolib.files import decode, named_folder
from neurolib.swc import Tree, read_swc
from neurolib.volume import SUFFIXES, Volume, read_volume

# Words that people append to the name of a neuron for its crops.
PART = re.compile(
    r"([_\-. ](body|tail|head|soma|axon|dendrite|dendrites|left|right|top|bottom|"
    r"(crop|part|tile|piece|section|stack)[_\-]?\d*))+$",
    re.IGNORECASE,
)

TREES = (".swc", ".eswc")

# OME's images and NeuroMorpho.org's trees have these before the suffix.
MARKS = (".ome", ".cng")

NEURONS_FILE = "neurons.csv"
# What a spreadsheet may have saved instead.
OTHER_TABLES = re.compile(r"neurons\.(csv\..+|tsv|txt|xlsx?|ods)")
# Data sets that are determined by their name and this version, so no file need be hashed.
GENERATED = ("synthetic",)
NAMED = (*GENERATED, "bigneuron-janelia", "fly-larva", "fly-larva-final")

# Pairs of this style are for evaluation only.
FINAL_STYLE = "real, final test set"


@dataclass(frozen=True)
class Pair:
    """An image and its tree: `name`, the `neuron` it shows, both files, and how it was made.

    channel, spacing: of the image, as `read_volume` takes them.
    """

    name: str
    neuron: str
    image: Path
    swc: Path
    style: str
    channel: int | None = None
    spacing: tuple[float, float, float] | None = None


def read_pair(pair: Pair) -> tuple[Volume, Tree]:
    """Read a pair: image, and tree in the voxels of the image."""
    volume = read_volume(pair.image, pair.channel, spacing=pair.spacing)
    return volume, read_swc(pair.swc, volume.known_spacing)


def stand_in(name: str) -> Path | None:
    """The folder that replaces a downloaded data set; None without ``$NEUROLIB_DATA``.

    It is the folder of that name in ``$NEUROLIB_DATA``, or ``$NEUROLIB_DATA`` itself.
    """
    root = named_folder("NEUROLIB_DATA")
    if root is not None and not root.is_dir():
        raise DataError(
            f"NEUROLIB_DATA={root}: no such folder; expected one of image/SWC pairs, or one that "
            f"holds a folder {name}"
        )
    places = [root / part for part in (name, name.removesuffix("-final"))] if root else []
    return next((place for place in places if place.is_dir()), root)


def folder_pairs(folder: str | Path, style: str = "real") -> list[Pair]:
    """Find the image/SWC pairs of a folder, sorted by name; see `pair_files` for the names.

    An optional ``neurons.csv`` with the columns ``name,neuron`` says which pairs show the same
    neuron. Without it, pairs whose names differ only in a final part word (``_body``, ``_tail``,
    ``_crop2``, ``_left_part1`` ...) show the same neuron. Case is ignored either way. A warning
    lists images and trees without a partner.
    """
    folder = Path(folder)
    images, trees = files_of(folder, SUFFIXES), files_of(folder, TREES)
    pairs = pair_files(images, trees)
    if not pairs:
        raise DataError(
            f"{folder}: found {len(images)} images and {len(trees)} SWC files, but no two with the "
            "same name; expected pairs such as cell1.tif and cell1.swc"
        )
    left = {file.name: why for file, why in alone(images, trees, pairs.values()).items()}
    if left:
        listed = ", ".join(f"{name} ({why})" for name, why in list(left.items())[:10])
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        warnings.warn(
            f"{folder}: {len(pairs)} pairs; left out: {listed}{more}", NeurolibWarning, stacklevel=2
        )
    neurons = neurons_of(folder, pairs, left)
    return [Pair(n, neurons[n], *files, style) for n, files in sorted(pairs.items())]


def pair_files(images: Sequence[Path], trees: Sequence[Path]) -> dict[str, tuple[Path, Path]]:
    """Images and trees of the same name, by that name.

    Names are first compared without their suffix. Files left over are compared without further
    suffixes (``cell.ome.tif``, ``cell.tif.swc``, ``cell.CNG.swc``) and in one Unicode form, and
    finally also without case. Several images or trees of one name raise a `DataError`.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    for key in (lambda name: _without(name, (*SUFFIXES, *TREES)), stem, same_name):
        groups: dict[str, tuple[list[Path], list[Path]]] = {}
        used = {file for pair in pairs.values() for file in pair}
        for kind, files in enumerate((images, trees)):
            for file in files:
                if file not in used:
                    groups.setdefault(key(file.name), ([], []))[kind].append(file)
        for name, found in groups.items():
            if not all(found):
                continue
            image, tree = (files[0] for files in found)
            # If the names differ in case, the image's is used.
            name = stem(image.name) if key is same_name else name
            for kind, files in zip(("images", "trees"), found, strict=True):
                if len(files) > 1 or name in pairs:
                    names = ", ".join(file.name for file in [*files, *pairs.get(name, ())])
                    raise DataError(
                        f"{image.parent}: two {kind} named {name} ({names}); keep one of them"
                    )
            pairs[name] = image, tree
    return pairs


def alone(
    images: Iterable[Path], trees: Iterable[Path], pairs: Iterable[tuple[Path, Path]]
) -> dict[Path, str]:
    """The files that are in no pair, and why."""
    pairs, left = list(pairs), {}
    for kind, files, partner in (("tree", images, 1), ("image", trees, 0)):
        taken = {same_name(pair[partner].name): pair[partner].name for pair in pairs}
        used = {pair[1 - partner] for pair in pairs}
        for file in files:
            other = taken.get(same_name(file.name))
            if file not in used:
                why = f"{other} is in another pair"
                left[file] = why if other else f"no {kind} named {stem(file.name)}"
    return left


def stem(name: str) -> str:
    """A file's name without suffixes and marks, in one Unicode form: ``cell.ome.tif`` is cell."""
    name = unicodedata.normalize("NFC", name.strip())
    while (shorter := _without(name, (*SUFFIXES, *TREES, *MARKS))) != name:
        name = shorter
    return name


def same_name(name: str) -> str:
    """A file's name in the form in which it must agree with another's."""
    return unicodedata.normalize("NFC", stem(name).casefold())


def _without(name: str, suffixes: tuple[str, ...]) -> str:
    """A name without its suffix if that is one of `suffixes` and something comes before it."""
    lower = name.lower()
    suffix = next((s for s in suffixes if lower.endswith(s) and len(name) > len(s)), "")
    return name[: len(name) - len(suffix)]


def find_name(asked: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `asked` means; `asked` may have a suffix or another case."""
    asked, names = asked.strip(), list(names)
    # A spreadsheet may list paths; but a name may hold a slash, too.
    for word in (asked, asked.replace("\\", "/").rpartition("/")[2]):
        for key in (str, stem, same_name):
            hits = [name for name in names if key(name) == key(word)]
            if len(hits) == 1:
                return hits[0]
    return None


def files_of(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a folder that end in one of `suffixes`, sorted.

    Hidden ones are left out: some systems leave "._cell.tif" beside "cell.tif".
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected {', '.join(NAMED)}, rendered:FOLDER or a folder "
            "of image/SWC pairs with the same names"
        )
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name.lower().endswith(suffixes) and not path.name.startswith(".")
    ]


def trees_by_name(folder: Path) -> dict[str, Path]:
    """The SWC files of a folder by their name, sorted."""
    files = {}
    for path in files_of(folder, TREES):
        name = _without(path.name, TREES)
        if name in files:
            raise DataError(f"{folder}: two trees named {name}; keep one of them")
        files[name] = path
    if not files:
        raise DataError(f"{folder}: found no SWC file; expected trees, such as cell1.swc")
    return dict(sorted(files.items()))


def neurons_of(folder: Path, names: Iterable[str], others: Iterable[str] = ()) -> dict[str, str]:
    """The neuron of each pair; rows of ``neurons.csv`` may also name one of the `others`."""
    names, given = list(names), {}
    listed = sorted(os.listdir(folder)) if folder.is_dir() else []
    tables = [name for name in listed if name.casefold() == NEURONS_FILE]
    if len(tables) > 1:
        raise DataError(f"{folder}: {' and '.join(tables)}; keep one of them")
    path = folder / next(iter(tables), NEURONS_FILE)
    rows = _read_rows(path) if tables else []
    for name in listed:
        if OTHER_TABLES.fullmatch(name.casefold()):
            told = (
                f"{folder / name}: cannot be read; save it as {NEURONS_FILE}, separated by commas"
            )
            warnings.warn(told, NeurolibWarning, stacklevel=2)
    for number, row in enumerate(rows, start=2):
        asked, neuron = unicodedata.normalize("NFC", row["name"].strip()), _tidy(row["neuron"])
        name = find_name(asked, names)
        if asked and not neuron:
            # A merged cell of a spreadsheet fills its first row only.
            raise DataError(
                f"{path}: row {number}: no neuron for {asked!r}; name it, or delete the row"
            )
        if name is None and (asked or neuron) and find_name(asked, others) is None:
            raise DataError(
                f"{path}: row {number}: no pair named {asked!r}; expected one of "
                f"{', '.join(sorted(names)[:20])}"
            )
        if name and given.setdefault(name, neuron).casefold() != neuron.casefold():
            raise DataError(
                f"{path}: row {number}: {asked!r} shows {given[name]!r} in an earlier row and "
                f"{neuron!r} here; keep one of them"
            )
    neurons = {name: given.get(name, PART.sub("", name) or name) for name in names}
    # Two spellings would be two neurons and might end up in two splits.
    spelling: dict[str, str] = {}
    return {n: spelling.setdefault(neuron.casefold(), neuron) for n, neuron in neurons.items()}


def _tidy(cell: str) -> str:
    """A cell without invisible characters, with single blanks only."""
    seen = "".join(c for c in cell if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFC", " ".join(seen.split()))


def _read_rows(path: Path) -> list[Mapping[str, str]]:
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header, *rows = [*csv.reader(text.split("\n"), strict=True), []]
    except csv.Error as error:  # an open quote would swallow the rows below it
        raise DataError(f"{path}: not a CSV file ({error}); close its quotation marks") from None
    columns = [column.strip().casefold() for column in header]
    if [columns.count(column) for column in ("name", "neuron")] != [1, 1]:
        given = ",".join(header)[:60]
        raise DataError(
            f"{path}: expected the columns name,neuron once each, found {given!r}; save it as CSV "
            "with commas"
        )
    return [dict.fromkeys(columns, "") | dict(zip(columns, row, strict=False)) for row in rows]
