"""Compare predictions with references: masks, trees or folders of them, as one table."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage, sparse
from scipy.spatial import KDTree

from neurolib.blocking import make_target
from neurolib.course.adapters import as_probability
from neurolib.course.statistics import aggregate
from neurolib.data.pairs import TREES, files_of, pair_files, same_name, stem
from neurolib.errors import DataError, NeurolibError, NothingFoundError, SwcError
from neurolib.evaluation import (
    FULL_CONNECTIVITY,
    cl_dice,
    compare,
    dice,
    finest_voxels,
    hd95,
    in_unit,
    short_pieces,
    surface_dice,
    volume_diagonal,
)
from neurolib.files import write_text
from neurolib.parameters import check_range
from neurolib.swc import Tree, Zyx, check_pair, components, length, read_swc
from neurolib.tracing import EMPTY_TREE, trace
from neurolib.volume import SUFFIXES, is_image, read_volume

# Columns of a table and their names in printed lines; columns of lengths also name the unit.
SCORES = {
    "dice": "Dice", "hd95_monai": "Hd95 (monai)", "hd95_medpy": "Hd95 (medpy)",
    "surface_dice": "surface Dice", "cldice": "clDice", "precision": "precision",
    "recall": "recall", "esa": "ESA", "dsa": "DSA", "pds": "PDS", "splits": "splits",
    "merges": "merges", "pieces": "pieces", "reference_pieces": "reference pieces",
    "length": "length", "reference_length": "reference length",
}  # fmt: skip
COLUMNS = ("name", *SCORES, "diagonal", "tolerance")  # of a table
MISSES = ("hd95_monai", "hd95_medpy", "esa", "dsa")  # infinite if only one side is empty
LENGTHS = (*MISSES, "length", "reference_length", "diagonal", "tolerance")


def evaluate(
    prediction: np.ndarray | Tree,
    reference: np.ndarray | Tree,
    spacing: Zyx = (1.0, 1.0, 1.0),
    tolerance: float | None = None,
) -> dict[str, float]:
    """All scores of a prediction against a reference; each is a mask or a tree.

    If either is a mask, they are compared both as masks and as trees: a tree is drawn as a tube
    (`neurolib.blocking.make_target`), a mask is traced (`neurolib.tracing.trace`), with default
    parameters; if all pieces are too small, they are kept. For two trees, mask scores are NaN.

    Each connected piece (of a mask) or tree matches the piece of the other side with which it
    shares the most voxels, or the most length within the tolerance. ``splits`` is the number of
    matched pieces of the prediction minus the number of pieces that they match, and ``merges`` is
    the same for the reference.

    If both are empty, overlaps are 1 and distances 0. If only one is, overlaps, precision and
    recall are 0, PDS is 1 and distances are infinite.

    Parameters
    ----------
    prediction, reference : boolean array (z, y, x), or Tree in its voxels
    spacing : (dz, dy, dx), which sets the unit of distances and lengths
    tolerance : for surface Dice, precision, recall, PDS, DSA and matches, in the same unit; by
        default 2 voxels of the finest axis

    Returns
    -------
    dict
        The keys of `SCORES`, ``diagonal`` (the largest possible distance), and ``tolerance``.
    """
    scale = np.array(spacing, dtype=float)
    tolerance = float(2 * scale.min() if tolerance is None else tolerance)
    pair = {"prediction": prediction, "reference": reference}
    shapes = [one.shape for one in pair.values() if not isinstance(one, Tree)]
    scores = dict.fromkeys(SCORES, float("nan"))
    if shapes:
        masks = [_as_mask(one, shapes[0], spacing, name) for name, one in pair.items()]
        scores["dice"] = dice(*masks)
        for method in ("monai", "medpy"):
            scores[f"hd95_{method}"] = hd95(*masks, spacing, method)
        scores["surface_dice"] = surface_dice(*masks, tolerance, spacing)
        scores["cldice"] = cl_dice(*masks)
        table = _shared_voxels(*masks)
        shared, pieces = (table, table.T), table.shape
        scores["diagonal"] = volume_diagonal(shapes[0], spacing)
    trees = [_as_tree(one, spacing) for one in pair.values()]
    scores |= _compare_trees(*trees, tolerance, spacing)
    if not shapes:
        shared = [_shared_length(*forests, tolerance, scale) for forests in (trees, trees[::-1])]
        pieces = [int((tree.parent < 0).sum()) for tree in trees]
        points = np.concatenate([tree.xyz for tree in trees]) * scale[::-1]
        scores["diagonal"] = float(np.linalg.norm(np.ptp(points, axis=0))) if len(points) else 0.0
    scores["splits"], scores["merges"] = map(_excess, shared)
    scores["pieces"], scores["reference_pieces"] = pieces
    return scores | {"tolerance": tolerance}


def _as_mask(one: np.ndarray | Tree, shape: tuple, spacing: tuple, name: str) -> np.ndarray:
    if not isinstance(one, Tree):
        return one
    if not len(one.parent):
        return np.zeros(shape, dtype=bool)
    check_pair(one, shape, name)
    return make_target(one, shape, spacing)[1]


def _as_tree(one: np.ndarray | Tree, spacing: tuple) -> Tree:
    if isinstance(one, Tree):
        return one
    try:
        return trace(one, spacing)
    except NothingFoundError:  # only specks, or nothing at all
        return trace(one, spacing, min_size=1) if one.any() else EMPTY_TREE


def _compare_trees(tree: Tree, reference: Tree, tolerance: float, spacing: tuple) -> dict:
    scores = compare(tree, reference, spacing, tolerance)
    del scores["trees"]
    lengths = {"length": length(tree, spacing), "reference_length": length(reference, spacing)}
    return lengths | {key.lower(): value for key, value in scores.items()}


def _shared_voxels(a: np.ndarray, b: np.ndarray) -> sparse.csr_array:
    """Number of voxels that each piece of mask a (rows) shares with each of b (columns)."""
    (label_a, count_a), (label_b, count_b) = (ndimage.label(m, FULL_CONNECTIVITY) for m in (a, b))
    both = a & b
    places = label_a[both] - 1, label_b[both] - 1
    return sparse.coo_array((np.ones(len(places[0])), places), shape=(count_a, count_b)).tocsr()


def _shared_length(
    tree: Tree, other: Tree, tolerance: float, scale: np.ndarray
) -> sparse.csr_array:
    """Length of each tree (rows) near another forest, by the nearest tree there (columns)."""
    tree, other, fine = finest_voxels(tuple(scale), tree, other)
    (points, lengths, row), (others, _, other_row) = short_pieces(tree), short_pieces(other)
    label, other_label = components(tree), components(other)
    shape = tuple(int((forest.parent < 0).sum()) for forest in (tree, other))
    if not len(points) or not len(others):
        return sparse.csr_array(shape)
    # Points along the other tree lie up to half a voxel apart.
    reach = np.hypot(tolerance / fine, 0.25)
    away, nearest = KDTree(others).query(points, distance_upper_bound=reach)
    near = np.isfinite(away)
    places = label[row[near]], other_label[other_row[nearest[near]]]
    return sparse.coo_array((lengths[near], places), shape=shape).tocsr()


def _excess(shared: sparse.csr_array) -> int:
    """Number of matched pieces (rows) minus the number of pieces (columns) that they match."""
    rows = shared.tocsr()
    ends = zip(rows.indptr[:-1], rows.indptr[1:], strict=True)
    matches = [int(rows.indices[i + np.argmax(rows.data[i:j])]) for i, j in ends if j > i]
    return len(matches) - len(set(matches))


# --- Files -------------------------------------------------------------------------------------


def evaluate_files(
    prediction: str | Path,
    reference: str | Path,
    out: str | Path | None = None,
    spacing: Zyx | None = None,
    tolerance: float | None = None,
    threshold: float | None = None,
) -> Iterator[str]:
    """Compare a file, or each file of a folder, with the reference of the same name.

    Distances, lengths and the tolerance are in µm if every voxel size is known, else in voxels of
    the finest axis; the table's header says which.

    Parameters
    ----------
    prediction, reference : paths
        Two files or two folders: masks, labels or probabilities (`neurolib.volume.read_volume`)
        and SWC files. A tree is in the voxels of its pair's mask. If a folder has a tree and an
        image of one name, the tree is used.
    out : path, optional
        The table to write, .csv, one line per pair.
    spacing : (dz, dy, dx) in µm, instead of those of the files
    tolerance, see `evaluate`
    threshold : on predicted probabilities, 0.5 if not given

    Yields
    ------
    str
        What is left out or converted, a line per pair, and, for several pairs, a line of means, in
        which an infinite distance becomes the diagonal of its volume. If one of several pairs
        cannot be compared, a line says why, the table omits it, and a `DataError` follows.
    """
    for option, value in (("tolerance", tolerance), ("threshold", threshold)):
        check_range(option, value, f"--{option} ")
    pairs, notes = _pairs(Path(prediction), Path(reference))
    yield from notes
    sizes, failed = {}, {}
    for name, pair in pairs.items():
        try:
            sizes[name] = (spacing, True) if spacing else _pair_spacing(pair)
        except NeurolibError as error:
            failed[name] = error
    unknown = [name for name, (_, known) in sizes.items() if not known]
    unit = "voxels" if unknown else "µm"
    if unknown:
        yield (
            f"voxel size unknown ({', '.join(unknown[:3])}{' ...' * (len(unknown) > 3)}): "
            "distances are in voxels of the finest axis; give --spacing Z,Y,X in µm"
        )
    rows = []
    for name, (size, known) in sizes.items():
        pair, words = pairs[name], ""
        try:
            one, notes_one = _read(pair[0], size if known else None, threshold)
            two, notes_two = _read(pair[1], size if known else None)
            words = f"{pair[0].name} with {pair[1].name}: "
            row = evaluate(one, two, in_unit(size, unit), tolerance)
        except NeurolibError as error:
            failed[name] = type(error)(f"{words}{error}")
            continue
        yield from (*notes_one, *notes_two)
        rows.append({"name": name} | row)
        yield _line(name, row, unit)
    if len(rows) > 1:
        yield _line(*_mean(rows), unit)
    if len(pairs) == 1 and failed:
        raise next(iter(failed.values()))
    yield from (f"{name}: not compared: {error}" for name, error in failed.items())
    if out is not None and rows:
        _write(Path(out), rows, unit)
        yield f"{out}: {len(rows)} lines, distances in {unit}"
    if failed:
        raise DataError(
            f"{len(failed)} of {len(pairs)} pairs could not be compared ({', '.join(failed)}); the "
            "reasons are above"
        )


def _pairs(one: Path, two: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Pairs of files by name, and lines on the files left out."""
    folders = [path.is_dir() and not is_image(path) for path in (one, two)]
    for path in (one, two):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder, expected masks or SWC files")
    if not any(folders):
        return {stem(one.name): (one, two)}, []
    if not all(folders):
        folder, file = (one, two) if folders[0] else (two, one)
        raise DataError(f"{folder} is a folder, {file} is not; expected two files or two folders")
    notes, files = [], []
    for folder in (one, two):
        usable = files_of(folder, (*SUFFIXES, *TREES))
        trees = {same_name(path.name) for path in usable if path.suffix.lower() in TREES}
        beside = [p for p in usable if p.suffix.lower() not in TREES and same_name(p.name) in trees]
        notes += _left_out(beside, "because their SWC is used")
        files.append([p for p in usable if p not in beside])
    pairs = dict(sorted(pair_files(*files).items()))
    if not pairs:
        raise DataError(
            f"{one}, {two}: found {len(files[0])} and {len(files[1])} masks and SWC files, but no "
            "two with the same name; expected names such as cell1.tif and cell1.swc"
        )
    used = {path for pair in pairs.values() for path in pair}
    for listed, other in zip(files, ("reference", "prediction"), strict=True):
        unused = [p for p in listed if p not in used]
        notes += _left_out(unused, f"that have no {other} of the same name")
    return pairs, notes


def _left_out(files: list[Path], why: str) -> list[str]:
    """A line on files that are left out, if there are any."""
    names = ", ".join(path.name for path in files[:10]) + " ..." * (len(files) > 10)
    return [f"{files[0].parent}: {len(files)} files left out {why}: {names}"] if files else []


def _pair_spacing(pair: tuple[Path, Path]) -> tuple[Zyx, bool]:
    """The voxel size (dz, dy, dx) in the masks of a pair, and whether its unit is known."""
    known, ratios = {}, {}
    for path in pair:
        if path.suffix.lower() in TREES:
            spacing = _read(path, None)[0].spacing
        else:
            volume = read_volume(path, check=False)
            spacing = volume.known_spacing
            if spacing is None and tuple(volume.spacing) != (1, 1, 1):
                ratios[path.name] = volume.spacing
        if spacing is not None:
            known[path.name] = spacing
    for sizes, unit in ((known, " µm"), (ratios, "")):
        if len(sizes) == 2 and not np.allclose(*sizes.values(), rtol=0.01):
            both = " and ".join(f"{name} {spacing}" for name, spacing in sizes.items())
            raise DataError(
                f"voxel sizes differ: {both} (z, y, x){unit}; give --spacing Z,Y,X in µm"
            )
    return next(iter((known or ratios).values()), (1.0, 1.0, 1.0)), bool(known)


def _read(
    path: Path, spacing: Zyx | None, threshold: float | None = None
) -> tuple[np.ndarray | Tree, list[str]]:
    """A mask or a tree, and what was converted."""
    if path.suffix.lower() in TREES:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise SwcError(f"{path.name}: cannot be read ({error.strerror})") from None
        if not any(line.strip() and not line.lstrip().startswith(b"#") for line in lines):
            return EMPTY_TREE, [f"{path.name}: no nodes, an empty tree"]
        tree = read_swc(path, spacing)
        return tree, [f"{path.name}: {'; '.join(tree.repairs)}"] if tree.repairs else []
    volume = read_volume(path, check=False)
    data, meaning = as_probability(volume.data, threshold=threshold, name=path.name)
    if data.dtype == bool:
        meaning = meaning if data.any() else "no foreground, an empty mask"
        return data, [f"{path.name}: {meaning}"] if meaning != "a mask" else []
    cut = 0.5 if threshold is None else threshold
    return data >= cut, [f"{path.name}: {meaning}, foreground from {cut:g}"]


def _mean(rows: list[dict]) -> tuple[str, dict]:
    """Heading (with the number of pairs and misses) and mean scores."""
    missed = sum(np.isinf(row["esa"]) for row in rows)
    mean = {}
    for key in SCORES:
        measured = [row for row in rows if not np.isnan(row[key])]
        if measured:
            diagonals = np.array([row["diagonal"] for row in measured])
            mean[key] = aggregate([row[key] for row in measured], diagonals).mean
    note = f" ({missed} empty, each distance set to the diagonal)" if missed else ""
    return f"mean of {len(rows)}{note}", mean


def _line(name: str, row: dict, unit: str) -> str:
    values = [
        f"{label} {row[key]:.4g}" + f" {unit}" * (key in LENGTHS)
        for key, label in SCORES.items()
        if key in row and not np.isnan(row[key])
    ]
    return f"{name}: {', '.join(values)}"


def _write(path: Path, rows: list[dict], unit: str) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_heads(unit))
    for row in rows:
        table.writerow([row["name"], *(_cell(row[key]) for key in COLUMNS[1:])])
    write_text(path, text.getvalue())


def _heads(unit: str) -> list[str]:
    suffix = "_um" if unit == "µm" else "_voxels"
    return [key + suffix * (key in LENGTHS) for key in COLUMNS]


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def is_table(path: Path) -> bool:
    """Whether a file is a table of `evaluate_files` without added words or columns."""
    try:
        head, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        numbers = [cell for row in rows for cell in row[1:] if cell]
        return (
            head in (_heads("µm"), _heads("voxels"))
            and all(len(row) == len(head) for row in rows)
            and all(_cell(float(cell)) == cell for cell in numbers)
        )
    except (OSError, ValueError, csv.Error):
        return False
