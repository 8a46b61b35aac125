"""Neurons of the fly larva's central nervous system: download, check, pair.

The volumes (confocal, one TIFF per slice) and semi-automatic traces are in the repository
TuFF_toolkit of the Tubularity Flow Field (Mukherjee, Condron and Acton, IEEE Trans. Image
Process. 24, 2015). It has no licence, so we copy only names and hashes: ``fly_larva.json``.
``fly-larva`` has 10 volumes of 8 neurons; ``fly-larva-final`` has 4 neurons for evaluating a
finished network, never for training or for any choice.
"""

import functools
import hashlib
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import tifffile
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, depth_first_order, minimum_spanning_tree
from scipy.spatial import KDTree
from tqdm.auto import tqdm

from neurolib.data.download import download, read_record
from neurolib.data.pairs import FINAL_STYLE, Pair, folder_pairs, stand_in
from neurolib.errors import DataError, NeurolibWarning
from neurolib.files import cache_folder, claim, sha256, write_text
from neurolib.swc import Tree, take, write_swc
from neurolib.volume import read_volume, write_volume

NAME, FINAL_NAME = "fly-larva", "fly-larva-final"
MANIFEST = Path(__file__).with_suffix(".json")
FINAL = ("class1_sn92", "sensory_I3-3", "sensory_M4-8", "sensory_M4-9")
URL = "https://raw.githubusercontent.com/suvadip21/TuFF_toolkit/{commit}"
VARIABLE = "NEUROLIB_FLY_LARVA_URL"
ORIGIN = (
    "Source: {repository} at commit {commit:.12}. It carries no licence: use the files, do not "
    "redistribute them."
)
# A slice takes 0.4 MB at most.
MAX_FILE = 1 << 20
# Hashes of the trees made here; those in the manifest are valid too.
RECORD = "trees.json"
# Components are joined across gaps of up to this many voxels.
GAP = 6.0


def load_fly_larva(name: str = NAME) -> list[Pair]:
    """Pairs of ``fly-larva`` or ``fly-larva-final``; the first call downloads them.

    ``$NEUROLIB_DATA`` (a folder of finished pairs, or one with a folder for each data set)
    replaces the download. Either way, images and trees must have the known hashes.
    """
    wanted, folder = _entries(name), stand_in(name)
    if folder is None:
        folder = _fetch(wanted)
    by_name = {pair.name: pair for pair in folder_pairs(folder)}
    missing = [entry["name"] for entry in wanted if entry["name"] not in by_name]
    if missing:
        message = f"{folder}: {len(missing)} of {len(wanted)} pairs of {name} are missing"
        message += f" ({', '.join(missing)})"
        if len(missing) == len(wanted):
            raise DataError(f"{message}; unset NEUROLIB_DATA to download them")
        warnings.warn(f"{message}; continuing without them", NeurolibWarning, stacklevel=3)
    style = "real" if name == NAME else FINAL_STYLE
    made = read_record(folder / RECORD)
    pairs = []
    for entry in wanted:
        if pair := by_name.get(entry["name"]):
            voxels = _hash_of_voxels(pair.image, pair.image.stat().st_mtime_ns)
            _check(pair.image, voxels, (entry["voxels"],))
            _check(pair.swc, sha256(pair.swc), (*entry["trees"], made.get(pair.name, "")))
            pairs.append(replace(pair, neuron=entry["neuron"], style=style))
    return pairs


def describe_fly_larva() -> str:
    """Number and place of the pairs in one line; nothing is downloaded."""
    wanted, own = _entries(NAME), stand_in(NAME)
    folder = own or cache_folder() / NAME
    missing = _lacking(wanted, folder)
    line = f"{NAME}: {len(wanted) - len(missing)} of {len(wanted)} pairs in {own or 'the cache'}"
    if missing and not own:
        size = sum(entry["raw_mb"] for entry in missing)
        line += f"; 'neurolib fetch {NAME}' downloads {size:.0f} MB"
    return line


def origin() -> str:
    """Source of the files, in one line."""
    return ORIGIN.format(**_manifest())


def _manifest() -> dict:
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def _entries(name: str) -> list[dict]:
    final = name == FINAL_NAME
    return [entry for entry in _manifest()["pairs"] if (entry["name"] in FINAL) == final]


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.tif", folder / f"{name}.swc"


def _lacking(entries: list[dict], folder: Path) -> list[dict]:
    return [e for e in entries if not all(path.exists() for path in _paths(folder, e["name"]))]


def _check(path: Path, digest: str, known: tuple[str, ...]) -> None:
    if digest not in known:
        raise DataError(
            f"{path}: not the published data (sha256 {digest:.16}, expected {known[0]:.16}); "
            "replace or delete it, or name its folder (--data FOLDER) if the change is yours"
        )


@functools.lru_cache(maxsize=64)
def _hash_of_voxels(path: Path, _changed: int) -> str:
    """Hash of the decoded stack, cached until the file changes."""
    return hashlib.sha256(np.ascontiguousarray(read_volume(path).data)).hexdigest()


# ------------------------------------------------------------------------------------ download


def _fetch(entries: list[dict]) -> Path:
    """Make the pairs that the cache lacks; return their folder."""
    folder = cache_folder() / NAME
    left = [folder / f".{entry['name']}" for entry in entries]
    # A call killed after finishing a pair leaves its raw files behind.
    if not _lacking(entries, folder) and not any(raw.exists() for raw in left):
        return folder
    address = (os.environ.get(VARIABLE) or URL.format(**_manifest())).rstrip("/")
    with claim(folder / ".lock"):
        missing = _lacking(entries, folder)
        total = sum(1 + len(entry["slices"]) for entry in missing)
        with tqdm(total=total, desc=NAME, unit="file", delay=1) as bar:
            for entry in missing:
                _make_pair(entry, folder, address, bar)
        for raw in left:
            shutil.rmtree(raw, ignore_errors=True)
    return folder


def _make_pair(entry: dict, folder: Path, address: str, bar: tqdm) -> None:
    """Download the raw files of a pair and write its image and tree."""
    name, raw = entry["name"], folder / f".{entry['name']}"
    slices = {raw / key: (entry["stem"] + key, digest) for key, digest in entry["slices"].items()}
    (trace,) = entry["swc"].items()
    for path, (place, digest) in {**slices, raw / "trace.swc": trace}.items():
        download(f"{address}/{quote(place)}", path, digest, MAX_FILE, VARIABLE)
        bar.update()
    # These are palette images with a grey palette, so the index is the intensity.
    stack = np.stack([tifffile.imread(path) for path in sorted(slices)])
    tree, joined = repair_trace((raw / "trace.swc").read_bytes(), stack.shape[1], entry["z_shift"])
    image, swc = _paths(folder, name)
    write_swc(swc, tree, f"{name}: y flipped, {joined} gaps joined, voxel units\n{origin()}")
    made = read_record(folder / RECORD) | {name: sha256(swc)}
    write_text(folder / RECORD, json.dumps(made, indent=1))
    write_volume(image, stack)  # last, because it completes the pair
    shutil.rmtree(raw)


# ------------------------------------------------------------------------------------- repairs


def repair_trace(trace: bytes, height: int, z_shift: float = 0.0) -> tuple[Tree, int]:
    """Turn a raw trace into a forest in the frame of the image.

    The tracer counted rows from the bottom (the image has `height` rows), saved each branch
    separately with its branch point repeated, and left cycles and gaps. Nodes whose parent is
    missing become roots; `z_shift` slices are added to z.

    Returns
    -------
    tree : Tree
        Each component rooted at its thickest node, the largest component first.
    joined : int
        Number of joined gaps.
    """
    table = np.loadtxt(trace.decode("ascii").splitlines(), usecols=range(7), ndmin=2)
    xyz = np.column_stack([table[:, 2], height - 1 - table[:, 3], table[:, 4] + z_shift])
    _, first, place = np.unique(np.round(xyz, 2), axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)
    node = dict(zip(table[:, 0], np.searchsorted(kept, first[place.ravel()]), strict=True))
    edges = [(node[row[0]], node[row[6]]) for row in table if row[6] in node]
    edges = np.unique(np.sort(np.reshape(edges, (-1, 2)).astype(int)), axis=0)
    edges = edges[edges[:, 0] != edges[:, 1]]
    xyz, radius = xyz[kept], table[kept, 5]

    def forest(weights: np.ndarray, edges: np.ndarray) -> tuple:
        graph = coo_array((weights, edges.T), shape=(len(xyz), len(xyz))).tocsr()
        return minimum_spanning_tree(graph), connected_components(graph, directed=False)[1]

    # Strategy: a minimum spanning forest cuts cycles at their longest edge and joins components
    # where they are closest. A gap weighs more than all edges together, so it never displaces one.
    _, component = forest(np.ones(len(edges)), edges)
    gaps = KDTree(xyz).query_pairs(GAP, output_type="ndarray").reshape(-1, 2)
    gaps = gaps[component[gaps[:, 0]] != component[gaps[:, 1]]]
    every = np.concatenate([edges, gaps])
    lengths = np.linalg.norm(xyz[every[:, 0]] - xyz[every[:, 1]], axis=1)
    lengths[len(edges) :] += lengths.sum()
    graph, joined = forest(lengths, every)
    return _rooted(graph, joined, xyz, radius), component.max() - joined.max()


def _rooted(graph, component: np.ndarray, xyz: np.ndarray, radius: np.ndarray) -> Tree:
    """A spanning forest as a `Tree`, parents before children."""
    order, parent = [], np.full(len(xyz), -1)
    for label in np.argsort(-np.bincount(component), kind="stable"):
        members = np.flatnonzero(component == label)
        root = members[radius[members].argmax()]
        visited, before = depth_first_order(graph, root, directed=False)
        order.append(visited)
        parent[visited[1:]] = before[visited[1:]]
    return take(Tree(xyz, radius, np.full(len(xyz), 3), parent), np.concatenate(order))
