"""Data sets: pairs of an image and its SWC, split by neuron.

A data set is a folder of pairs with the same name (``cell.tif`` and ``cell.swc``): generated
(``synthetic``), rendered from given trees (``rendered:FOLDER``), downloaded (``fly-larva``,
``bigneuron-janelia``), or your own.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from neurolib.data import synthesis
from neurolib.data.bigneuron import fetch_janelia
from neurolib.data.fly_larva import load_fly_larva
from neurolib.data.formats import files_read
from neurolib.data.pairs import (
    FINAL_STYLE,
    GENERATED,
    NAMED,
    Pair,
    files_of,
    find_name,
    folder_pairs,
    neurons_of,
    pair_files,
    read_pair,
    stand_in,
    trees_by_name,
)
from neurolib.errors import DataError
from neurolib.files import atomic_path, cache_folder, naming, sha256, text_key, write_text
from neurolib.parameters import three_numbers
from neurolib.swc import Tree, read_swc, write_swc
from neurolib.volume import SUFFIXES, Volume, write_volume

# The name of a data set rendered from the trees of a folder, perhaps with its microscope.
RENDERED = re.compile(r"rendered(-(?P<style>[^:/\\]*))?:(?P<folder>.+)")


@dataclass(frozen=True)
class Split:
    """Pairs for training, validation and test; no neuron is in two of them."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def __iter__(self):
        return iter((self.train, self.validation, self.test))


def load_dataset(name: str | Path, channel: int = -1, spacing: str = "") -> list[Pair]:
    """Pairs of a data set.

    Parameters
    ----------
    name : str or path
        ``synthetic``, ``fly-larva``, ``fly-larva-final``, ``bigneuron-janelia``, a folder of
        pairs, or ``rendered:FOLDER`` (or ``rendered-STYLE:FOLDER``) for the SWC files of a folder
        (see `rendered_pairs`). Folders are relative to the working directory.
    channel : int
        Which channel of the images to read, counted from 0; -1 if they have only one.
    spacing : str
        Z,Y,X in µm; empty for what the images record.
    """
    options = {"channel": None if channel < 0 else channel}
    options["spacing"] = three_numbers(spacing, "spacing=", positive=True)
    return [replace(pair, **options) for pair in _pairs_of(name)]


def _pairs_of(name: str | Path) -> list[Pair]:
    if str(name) == "synthetic":
        return synthetic_pairs()
    if str(name) == "bigneuron-janelia":
        own = stand_in(name)
        return folder_pairs(own if own and own.name == name else fetch_janelia())
    if str(name) in NAMED:
        return load_fly_larva(str(name))
    if rendered := RENDERED.fullmatch(str(name)):
        # In "rendered-:" the style was forgotten; it does not mean the default one.
        style = rendered["style"]
        return rendered_pairs(rendered["folder"], "flylight" if style is None else style)
    return folder_pairs(name)


def folder_in(name: str) -> str:
    """The folder at the end of a data set's name, "" if there is none."""
    if name in NAMED:
        return ""
    rendered = RENDERED.fullmatch(name)
    return rendered["folder"] if rendered else name


def name_from(name: str, start: str | Path) -> str:
    """Rewrite the folder in a data set's name, if there is one, relative to the folder `start`."""
    folder = folder_in(name)
    if not folder or not Path(folder).is_dir():
        return name
    return name.removesuffix(folder) + os.path.relpath(folder, start)


def data_label(data: str) -> str:
    """A data set's name as part of a file name: ``rendered:a/b`` is ``rendered-b``."""
    folder = folder_in(data)
    if folder == data:
        return Path(data).resolve().name
    return data.replace(f":{folder}", f"-{Path(folder).name}") if folder else data


def data_key(data: str) -> str:
    """Identify the pairs of a data set by the contents and neurons of its files."""
    if data in GENERATED:
        return data
    return ",".join(
        f"{pair.neuron}:{file.name}:{_digest(file)}"
        for pair in load_dataset(data)
        for file in (pair.image, pair.swc)
    )


def split_by_neuron(
    pairs: list[Pair],
    test: int = 1,
    validation: int = 1,
    seed: int = 0,
    held_out: str | int | Sequence[str] = "",
    validate_on: str | int | Sequence[str] = "",
    train: int = 0,
) -> Split:
    """Split pairs so that all crops of a neuron stay together.

    Parameters
    ----------
    pairs : list of Pair
    test, validation : int
        Numbers of neurons.
    seed : int
        Seeds the shuffle of the neurons.
    held_out, validate_on : str, int or sequence of str
        Names of test and validation neurons (or of their pairs), separated by commas, instead of a
        random draw. A name may itself contain commas, or be a number.
    train : int
        Number of neurons to train on, drawn from the rest; 0 takes all. With the same seed, a
        smaller draw is part of a larger one.
    """
    refuse_final(pairs)
    if min(test, validation, train) < 0:
        raise DataError(f"test={test}, validation={validation}, train={train}: expected 0 or more")
    neurons = sorted({pair.neuron for pair in pairs})
    order = [neurons[i] for i in np.random.default_rng(seed).permutation(len(neurons))]
    by_name = {pair.name: pair.neuron for pair in pairs} | {n: n for n in neurons}

    def named(key: str, asked: str | int | Sequence[str]) -> list[str]:
        chosen = {by_name[name] for name in _asked(key, asked, by_name, neurons)}
        return [n for n in order if n in chosen]

    tests, checks = named("held_out", held_out), named("validate_on", validate_on)
    both = set(tests) & set(checks)
    if both:
        raise DataError(f"{min(both)}: named in both held_out and validate_on; choose one")
    free = [n for n in order if n not in tests and n not in checks]
    if not tests:
        tests, free = free[:test], free[test:]
    if not checks:
        checks, free = free[:validation], free[validation:]
    if not free:
        raise DataError(
            f"{len(neurons)} neurons cannot be split into {len(tests) or test} for test, "
            f"{len(checks) or validation} for validation and at least one for training; add pairs "
            "or hold out fewer"
        )
    if train > len(free):
        raise DataError(
            f"train={train}: only {len(free)} of {len(neurons)} neurons are left to train on; add "
            "pairs or ask for fewer"
        )
    groups = free[: train or len(free)], checks, tests
    return Split(*(tuple(pair for pair in pairs if pair.neuron in group) for group in groups))


def refuse_final(pairs: Iterable[Pair]) -> None:
    """Refuse neurons of a final test set (DataError), because something is chosen on `pairs`."""
    for pair in pairs:
        if pair.style == FINAL_STYLE:
            raise DataError(
                f"{pair.name}: in a final test set, never to train or validate on; evaluate with "
                "'neurolib run --data fly-larva-final --profile final -p checkpoint=FILE'"
            )


def _asked(
    key: str, asked: str | int | Sequence[str], known: Iterable[str], neurons: list[str]
) -> list[str]:
    """The `known` names that a setting lists."""
    if isinstance(asked, int):
        # YAML reads 007 as a number.
        numbers = [name for name in known if name.isdecimal() and int(name) == asked]
        asked = numbers if len(numbers) == 1 else str(asked)
    chosen = []
    for rest in [asked.split(",")] if isinstance(asked, str) else [[name] for name in asked]:
        while rest:
            # Names may contain commas: try the longest run of words first, but no list of paths.
            runs = ((end, ",".join(rest[:end]).strip()) for end in range(len(rest), 0, -1))
            hits = (
                (end, find_name(run, known))
                for end, run in runs
                if end == 1 or run in known or "," not in run.replace("\\", "/").rpartition("/")[0]
            )
            end, name = next((hit for hit in hits if hit[1] is not None), (1, ""))
            word, rest = rest[0].strip(), rest[end:]
            if word and not name:
                raise DataError(f"{key}: no neuron {word!r}; expected one of {', '.join(neurons)}")
            chosen += [name] if name else []
    return chosen


def write_manifest(path: str | Path, split: Split, seed: int) -> Path:
    """Write a split as JSON, with the hash of each file and the seed."""
    entries = []
    for role, pairs in vars(split).items():
        for pair in pairs:
            entry = {"name": pair.name, "neuron": pair.neuron, "split": role, "style": pair.style}
            for kind, file in (("image", pair.image), ("swc", pair.swc)):
                entry |= {kind: str(file), f"{kind}_sha256": _digest(file)}
            entries.append(entry | {"channel": pair.channel, "spacing": pair.spacing})
    return write_text(path, json.dumps({"seed": seed, "pairs": entries}, indent=1))


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder (OME-Zarr).

    Of a set of OME files that hold one image, the hash of each, with commas between them.
    """
    if path.is_file():
        return ",".join(sha256(file) for file in files_read(path) if file.is_file())
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = "".join(f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def read_manifest(path: str | Path) -> Split:
    """Read a split; refuse it if a file has changed since."""
    path = Path(path)
    groups = {"train": (), "validation": (), "test": ()}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["pairs"]:
            files = Path(entry["image"]), Path(entry["swc"])
            # Old splits have neither.
            channel, spacing = entry.get("channel"), entry.get("spacing")
            options = entry["style"], channel, tuple(spacing) if spacing else None
            pair = Pair(entry["name"], entry["neuron"], *files, *options)
            for kind, file in zip(("image", "swc"), files, strict=True):
                if not file.exists() or _digest(file) != entry[f"{kind}_sha256"]:
                    raise DataError(f"{file}: missing, or not the one in {path}; rerun notebook 01")
            groups[entry["split"]] += (pair,)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a readable split; run notebook 01 first") from None
    return Split(**groups)


# Large enough for an arbor, small enough for two cores.
SYNTHETIC_COUNT = 6
SYNTHETIC_SHAPE = (48, 192, 192)


def synthetic_pairs() -> list[Pair]:
    """Generate the embedded data set, or find it in the cache.

    The hash of the generator's source names the cache folder, so that a changed generator never
    uses old data.
    """
    source, size = sha256(synthesis.__file__)[:12], "x".join(map(str, SYNTHETIC_SHAPE))
    folder = cache_folder() / f"synthetic-confocal-{size}-n{SYNTHETIC_COUNT}-s0-{source}"
    if not folder.is_dir():
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for i in range(SYNTHETIC_COUNT):
                tree = synthesis.grow(i, SYNTHETIC_SHAPE)
                volume = synthesis.render(tree, SYNTHETIC_SHAPE, style="confocal", seed=i)
                write_volume(temporary / f"synthetic_{i}.tif", volume.data, volume.spacing)
                write_swc(temporary / f"synthetic_{i}.swc", tree, "generated, not a real neuron")
    return folder_pairs(folder, style="synthetic")


def rendered_pairs(folder: str | Path, style: str = "flylight") -> list[Pair]:
    """Render the trees of a folder as a microscope would show them, or find them in the cache.

    The folder holds SWC files in voxels of equal sides, and optionally ``neurons.csv`` as for
    `folder_pairs`; the style is one of `neurolib.data.synthesis.STYLES`. The trees are real, the
    stacks are not: the pairs' `style` is "rendered from gold". Each stack is the tree's bounding
    box with a margin (`synthesis.ROOM` voxels beyond the tubes). The SWC beside it is the given one
    moved into that box; its first lines give the shift. Staining and noise depend on the file name
    alone, so a neuron looks the same in any folder. If a tree is unusable, nothing is rendered.

    Each pair is cached under the style, the hash of the generator's source, and the hash of its
    SWC's name and content. So an interrupted call resumes, and only a changed tree is rendered
    again.
    """
    if style not in synthesis.STYLES:
        known = ", ".join(f"rendered-{name}:FOLDER" for name in synthesis.STYLES)
        raise DataError(
            f"rendered-{style}: no such microscope; expected {known}; rendered:FOLDER is flylight"
        )
    folder = Path(folder)
    files = trees_by_name(folder)
    neurons = neurons_of(folder, files)
    shelf = cache_folder() / f"rendered-{style}-{sha256(synthesis.__file__)[:12]}"
    places = {}
    for name, path in files.items():
        try:
            key = text_key(f"{name}\0{sha256(path)}")
        except OSError as error:
            reason = f"cannot be read ({error.strerror}); expected an SWC file"
            raise DataError(f"{path}: {reason}") from None
        # A file's name may already be as long as a name can be.
        places[name] = shelf / f"{name[:40]}-{key}"
    missing = [name for name, place in places.items() if not place.is_dir()]
    for name in missing:
        # Check all trees before rendering the first, so that no error comes minutes later.
        _read_to_render(files[name])
    for name in tqdm(missing, desc="rendering", mininterval=2, disable=not missing):
        if not places[name].is_dir():  # another process may have made it by now
            _render_pair(files[name], places[name], style)
    return [
        Pair(n, neurons[n], place / f"{n}.tif", place / f"{n}.swc", "rendered from gold")
        for n, place in places.items()
    ]


def _read_to_render(path: Path) -> Tree:
    tree = read_swc(path)
    with naming(path.name):
        synthesis.extract_box(tree)
    return tree


def _render_pair(path: Path, place: Path, style: str) -> None:
    """Render one SWC into the folder `place`, atomically."""
    tree = _read_to_render(path)
    seed = int(hashlib.sha256(path.stem.encode()).hexdigest()[:8], 16)
    volume, moved = synthesis.render_extract(tree, style, seed)
    shift = " ".join(f"{d:+.0f}" for d in (moved.xyz - tree.xyz)[0])
    with atomic_path(place) as temporary:
        temporary.mkdir()
        write_volume(temporary / f"{path.stem}.tif", volume.data, volume.spacing)
        origin = f"the tree of {path.name}, moved by (x y z) {shift} voxels"
        write_swc(temporary / f"{path.stem}.swc", moved, f"{origin}; its image is rendered")


def measure(data: list[Pair] | str | Path) -> list[dict[str, float]]:
    """Statistics of trees and stacks for `neurolib.data.synthesis.calibration`.

    One row per neuron: `synthesis.statistics` and, with images, `synthesis.image_statistics`. A
    folder without pairs gives the statistics of its trees alone.
    """
    if not isinstance(data, list):
        trees = trees_by_name(Path(data))
        if not pair_files(files_of(Path(data), SUFFIXES), list(trees.values())):
            return [_measured(path, read_swc(path)) for path in trees.values()]
        data = folder_pairs(data)
    return [_measured(pair.image, *read_pair(pair)[::-1]) for pair in data]


def _measured(path: Path, tree: Tree, volume: Volume | None = None) -> dict[str, float]:
    with naming(path.name):
        facts = synthesis.statistics(tree)
        return facts | synthesis.image_statistics(volume, tree) if volume else facts
