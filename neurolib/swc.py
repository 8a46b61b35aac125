"""SWC trees: reading, writing, and geometry.

A tree lives in the voxel frame of its image: x = column, y = row, z = slice, voxel centres at
integers. Sizes and spacings are in array order (z, y, x), as everywhere else.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, depth_first_order

from neurolib.data.formats import check_spacing
from neurolib.errors import DataError, NeurolibError, SettingsError, SwcError
from neurolib.files import decode, naming, seal_text, write_text
from neurolib.parameters import check_range
from neurolib.volume import Volume

Zyx = tuple[float, float, float]  # a spacing or a place

COLUMNS = "id type x y z radius parent"
SOMA = 1
# R, Python and C write these for a missing radius.
NO_RADIUS = ("na", "none", "null", "nan(ind)", "-nan(ind)")
# Units named in the comments of SWC files, and their lengths in µm; 0 means voxels.
UNITS = {
    r"nm|nanomet\w+": 1e-3,
    r"[uµμ]m|microns?|micromet\w+": 1.0,
    r"mm|millimet\w+": 1e3,
    r"voxels?|pixels?|px": 0.0,
}


@dataclass(frozen=True)
class Tree:
    """A forest of neurite trees in voxel coordinates (voxel centres at integers).

    xyz (n, 3) float64: x = column, y = row, z = slice; radius (n,) voxels; type (n,) SWC type;
    parent (n,) row index of the parent, -1 for a root; repairs: what the reader mended or
    converted; spacing: (dz, dy, dx) of the voxels in µm, if the file gives it.
    """

    xyz: np.ndarray
    radius: np.ndarray
    type: np.ndarray
    parent: np.ndarray
    repairs: tuple[str, ...] = ()
    spacing: Zyx | None = None


# Reading --------------------------------------------------------------------------------------


def read_swc(path: str | Path, spacing: Sequence[float] | None = None) -> Tree:
    """Read an SWC (or .eswc) file.

    The reader accepts comments anywhere, blanks, tabs or commas between columns, ids written as
    floats, ids up to 2^63, any line ends, UTF-8, UTF-16 or Latin-1, columns after the seventh,
    and several roots. It repairs, with an entry in ``Tree.repairs``, a node listed twice with the
    same content, a node that is its own parent, a parent that is not in the file (its child
    becomes a root), a radius that is not a positive number (set to 1), a heading without ``#``, a
    soma written as three points (read as one sphere), and children listed before their parents
    (the nodes are put in depth-first order).

    It also uses, and reports, comments about the frame: ``OFFSET x y z`` is added to every node,
    and coordinates and radii with a unit (``# All positions and radii in um``) are converted to
    voxels if the voxel size is known. So are those in another unit with a voxel separation in that
    unit. ``SCALE`` is reported but not used.

    Parameters
    ----------
    path : str or Path
        See `transform` for frames that the file does not describe.
    spacing : sequence of float, optional
        (dz, dy, dx) of the image in µm, for files in a physical unit. By default, the voxel size
        is taken from the comments (``# Voxel separation (x,y,z): 0.5, 0.5, 2``, as written by
        `write_swc` and SNT).

    Returns
    -------
    Tree
        With every parent before its children.

    Notes
    -----
    A `SwcError` names the line if it has fewer than seven columns or something other than finite
    numbers, if its id repeats with different content, or if its node is its own ancestor. The
    columns are those of Cannon et al., J. Neurosci. Methods 84 (1998).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SwcError(f"{path.name}: cannot be read ({error.strerror}); check {path}") from None
    if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SwcError(f"{path.name}: found binary data, expected the text lines of an SWC file")
    report = _Report(path.name, decode(raw).split("\n"))
    tree = _assemble(_parse(report), report)
    with naming(path.name):
        return _use_comments(_one_sphere(tree), report.lines, spacing)


def _parse(report: "_Report") -> np.ndarray:
    """Columns of all nodes, (n, 7); a heading without # is blanked in the report's lines.

    Strategy: NumPy's C parser reads a well-formed file. What it refuses goes through the line
    parser, which either understands it or names the bad line.
    """
    try:
        if any(line and not line.isspace() and line[0] != "#" for line in report.lines):
            return np.loadtxt(report.lines, comments="#", usecols=range(7), ndmin=2)
    except ValueError:
        pass
    return _parse_lines(report)


def _parse_lines(report: "_Report") -> np.ndarray:
    rows, name = [], report.name
    for number, line in enumerate(report.lines, start=1):
        words = line.partition("#")[0].split()
        tokens = " ".join(words).replace(",", " ").split()
        if len(tokens) > 5 and tokens[5].lower() in NO_RADIUS:
            tokens[5] = "nan"
        odd = next((token for token in tokens[:7] if not _is_number(token)), None)
        if not tokens:
            continue
        if not rows and not any(map(_is_number, tokens)):
            _check_heading(line, f"{name}: line {number}")
            report.repairs.append(f"line {number}: heading without # skipped")
            report.lines[number - 1] = ""
            continue
        decimals = len(words) == 1 and len(tokens) == 11 and "." not in line  # as 1,3,2,5,1,0 ...
        if decimals or (len(words) >= 7 and any("," in word.strip(",") for word in words)):
            problem = "commas inside numbers, expected decimal points; replace them"
        elif len(tokens) < 7:
            problem = f"{len(tokens)} columns, expected 7 ({COLUMNS})"
        elif odd is not None:
            problem = f"{odd[:20]!r}, expected a number ({COLUMNS})"
        else:
            rows.append([float(token) for token in tokens[:7]])
            continue
        raise SwcError(f"{name}: line {number}: found {problem}")
    if not rows:
        raise SwcError(f"{name}: no nodes found, expected lines of 7 columns ({COLUMNS})")
    return np.array(rows)


def _check_heading(line: str, where: str) -> None:
    """Refuse columns in another order than that of `COLUMNS`, if a heading names x, y and z."""
    # Without the first words of "# Columns: id type x y z radius parent".
    columns = re.sub(r".*[:=](?=.*\bx\b)", "", line.lower())
    cells = re.split(r"\s*,\s*|\s+", columns.strip("#/%; \t\n"))
    expected = {"x": 2, "y": 3, "z": 4, "r": 5, "radius": 5, "parent": 6, "pid": 6}
    if {"x", "y", "z"} <= set(cells):
        for word, place in expected.items():
            if word in cells and cells.index(word) != place:
                raise SwcError(
                    f"{where}: {word} is column {cells.index(word) + 1}, expected the columns "
                    f"{COLUMNS}; save them in this order, without an index column"
                )


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    # Python takes "1_000" for a number.
    return "_" not in token


class _Report:
    """Errors and repairs that name lines; their numbers are computed when first needed."""

    def __init__(self, name: str, lines: list[str]):
        self.name, self.lines, self.repairs = name, lines, []

    @functools.cached_property
    def numbers(self) -> list[int]:
        return [k for k, line in enumerate(self.lines, 1) if line.partition("#")[0].strip()]

    def error(self, row: int, what: str) -> SwcError:
        return SwcError(f"{self.name}: line {self.numbers[row]}: {what}")

    def repair(self, rows: np.ndarray, what: str) -> None:
        """Name up to three lines and count the rest."""
        if len(rows):
            shown = ", ".join(str(self.numbers[row]) for row in rows[:3])
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            self.repairs.append(f"line{'s' if len(rows) > 1 else ''} {shown}{more}: {what}")


def _assemble(table: np.ndarray, report: _Report) -> Tree:
    """Check the table (n, 7), mend what is unambiguous, and turn ids into row indexes."""
    keys = _checked_keys(table, report)
    for row in np.flatnonzero(keys[:, 0] == -1)[:1]:
        raise report.error(row, "id -1, which also marks roots; number the nodes from 1")
    order = np.argsort(keys[:, 0], kind="stable")
    again = np.flatnonzero(np.diff(keys[order, 0]) == 0)
    first, second = order[again], order[again + 1]
    differ = (keys[first] != keys[second]).any(axis=1)
    differ |= ~np.isclose(table[first], table[second], 0, 0, equal_nan=True).all(axis=1)
    for one, other in zip(first[differ], second[differ], strict=True):
        known = f"id {keys[other, 0]} is already used in line {report.numbers[one]}"
        raise report.error(other, f"{known}, with different content; ids must be unique")
    report.repair(np.sort(second), "repeats an earlier node, dropped")
    rows = np.delete(np.arange(len(table)), second)
    table, (ids, wanted), n = table[rows], keys[rows].T, len(rows)

    order = np.argsort(ids)
    parent = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), n - 1)]
    parent[ids[parent] != wanted] = -1
    # Trees cut out of larger ones have such parents.
    report.repair(rows[(parent < 0) & (wanted != -1)], "no such parent, taken as a root (-1)")
    itself = parent == np.arange(n)
    report.repair(rows[itself], "its own parent, taken as a root")
    parent[itself] = -1
    flat = ~(table[:, 5] > 0)
    report.repair(rows[flat], "radius not positive, set to 1")
    radius = np.where(flat, 1.0, table[:, 5])

    tree = Tree(table[:, 2:5].copy(), radius, table[:, 1].astype(np.int64), parent)
    late = parent > np.arange(n)
    if late.any():
        order, row = _depth_first(parent)
        if row is not None:
            what = f"node {ids[row]} is its own ancestor; cut the cycle with parent -1"
            raise report.error(rows[row], what)
        tree = take(tree, order)
        report.repair(rows[late], "listed before its parent, nodes reordered")
    return replace(tree, repairs=tuple(report.repairs))


def _checked_keys(table: np.ndarray, report: _Report) -> np.ndarray:
    """Ids and parents (n, 2) as integers; an error for an unusable number in the table."""
    column = np.arange(7)
    whole = np.isin(column, (0, 1, 6))
    for wrong, expected in (
        # Some programs write NaN for an unknown radius.
        (~np.isfinite(table) & ~(np.isnan(table) & (column == 5)), "a number"),
        (whole & ((np.floor(table) != table) | (np.abs(table) >= 2**63)), "a whole number"),
        (~whole & (np.abs(table) > 1e9), "at most 1e9 voxels; the file is damaged"),
    ):
        for row, k in np.argwhere(wrong)[:1]:
            what = f"{COLUMNS.split()[k]} is {table[row, k]:g}, expected {expected}"
            raise report.error(row, what)
    keys = table[:, [0, 6]].astype(np.int64)
    for row in np.flatnonzero((np.abs(table[:, [0, 6]]) >= 2**53).any(axis=1)):
        # From 2^53 on, floats cannot tell neighbouring integers apart.
        tokens = report.lines[report.numbers[row] - 1].replace(",", " ").split()
        try:
            keys[row] = [int(tokens[k].removesuffix(".0")) for k in (0, 6)]
        except (ValueError, OverflowError):
            what = "an id above 2^53 that has lost digits, expected a whole number"
            raise report.error(row, what) from None
    return keys


def _one_sphere(tree: Tree) -> Tree:
    """Turn each soma of three points into one sphere.

    NeuroMorpho.org writes a soma as its centre and two children, at the centre - r and + r: a
    cylinder with the sphere's surface area.
    """
    soma = tree.type == SOMA
    inner = np.flatnonzero(soma & (tree.parent >= 0))
    inner = inner[(soma & (tree.parent < 0))[tree.parent[inner]]]
    dropped = []
    for root in np.unique(tree.parent[inner]):
        pair = inner[tree.parent[inner] == root]
        r = tree.radius[root]
        steps = tree.xyz[pair] - tree.xyz[root]
        # Files give two decimals; the points may lie along any axis.
        near = {"rtol": 0.05, "atol": 0.02}
        if (
            len(pair) == 2
            and not (soma & np.isin(tree.parent, pair)).any()
            and np.allclose(tree.radius[pair], r, **near)
            and np.allclose(np.linalg.norm(steps, axis=1), r, **near)
            and np.linalg.norm(steps.sum(axis=0)) <= 0.05 * r + 0.02
        ):
            dropped.extend(pair)
    if not dropped:
        return tree
    parent = np.where(np.isin(tree.parent, dropped), tree.parent[tree.parent], tree.parent)
    kept = np.setdiff1d(np.arange(len(parent)), dropped)
    repairs = (*tree.repairs, "three-point soma, read as one sphere")
    return replace(take(replace(tree, parent=parent), kept), repairs=repairs)


def _use_comments(tree: Tree, lines: list[str], spacing: Sequence[float] | None) -> Tree:
    """Apply the offset and the unit in the comments of an SWC file, and report this."""
    unit, header, repairs = None, {}, []
    number = r"\s*[:=]?\s*" + r"[\s,;]+".join([r"([-+.\de]+)"] * 3)
    keys = {"OFFSET": "OFFSET", "SCALE": "SCALE", "separation": r"Voxel separation \(x,\s*y,\s*z\)"}
    for comment in (line for line in lines if line.lstrip().startswith("#")):
        shown = comment.strip("# \t")[:60]
        cells = set(re.split(r"[\s,]+", comment.lower()))
        # With "and", it is a sentence about the columns.
        if {"parent", "pid"} & cells and "and" not in cells:
            _check_heading(comment, f"heading {shown!r}")
        for key, words in keys.items():
            match = re.match(rf"[\s#]*{words}{number}", comment, re.IGNORECASE)
            if match and all(map(_is_number, match.groups())):
                header[key] = np.array(match.groups(), dtype=float)
            elif re.match(rf"[\s#]*{words}\s*[:=]?\s*[-+.\d]", comment, re.IGNORECASE):
                repairs.append(f"header: {shown!r} not used, expected three numbers")
        try:
            unit = _unit_in(comment) or unit
        except ValueError:
            repairs.append(f"header: {shown!r} not used, expected one unit, such as '# units: um'")

    def text(values: np.ndarray) -> str:
        return ", ".join(f"{value:g}" for value in values)

    if header.get("OFFSET", np.zeros(3)).any():
        repairs.append(f"header: OFFSET {text(header['OFFSET'])} added to every node")
        tree = replace(tree, xyz=tree.xyz + header["OFFSET"])
    if (header.get("SCALE", np.ones(3)) != 1).any():
        repairs.append(f"header: SCALE {text(header['SCALE'])} not used")
    written, separation = None, header.get("separation")
    if unit and separation is not None:
        # With positions in voxels, `write_swc` still gives it in µm.
        written = separation[::-1] * (unit[1] or 1)
        tree = replace(tree, spacing=tuple(written.tolist()))
    if separation is not None and not unit and separation.min() > 0 and (separation != 1).any():
        # As SNT writes for images in inches, say, or in a unit that it does not know.
        tree = transform(tree, separation[::-1])
        repairs.append(
            "header: positions in the unit of the voxel separation, converted to voxels of "
            f"{text(separation)} (x, y, z)"
        )
    if unit and unit[1]:
        word, size = unit
        voxel = written if spacing is None else np.array(spacing)
        if voxel is not None:
            tree = transform(tree, voxel / size)
            note = f"{word}, converted to voxels of {text(voxel[::-1])} µm (x, y, z)"
            if written is not None and not np.allclose(voxel, written, 1e-3):
                note += f"; the header has {text(separation)} {word}"
        else:
            note = f"{word}, not converted, because the voxel size is not known"
        repairs.append(f"header: unit {note}")
    return replace(tree, repairs=(*tree.repairs, *repairs))


def _unit_in(comment: str) -> tuple[str, float] | None:
    """The unit that a comment names for all coordinates, in words and in µm, if it names one.

    After ``units:`` it may have a factor, as in navis' ``"units": "8 nanometer"``. ValueError:
    several units, an unknown one, a factor per axis, or a number that does not follow ``units:``.
    """
    whole = r"\b(units?|coordinates|positions|all values|xyz|x, ?y, ?z in)\b"
    if not re.search(whole, comment, re.IGNORECASE):
        return None
    named, stated = {}, re.search(r"\bunits?['\"]?\s*[:=]", comment, re.IGNORECASE)
    for words, size in UNITS.items():
        for before, word in re.findall(rf"([^\s:='\"]*)\s*\b({words})\b", comment, re.IGNORECASE):
            if any(map(str.isdecimal, before)):
                if not stated:  # a thickness or a resolution
                    raise ValueError
                named[size * float(before)] = f"{before} {word}"
            else:
                named[size] = word
    if len(named) > 1 or (stated and not named):
        raise ValueError
    return next(((word, size) for size, word in named.items()), None)


# Order ----------------------------------------------------------------------------------------


def topological_order(tree: Tree) -> np.ndarray:
    """Rows of `tree` (n,) with every parent before its children.

    A tree already in such an order keeps it; others are put in depth-first order, with
    siblings in the tree's order. A cycle is an `SwcError`.
    """
    parent = _checked_parent(tree)
    if np.all(parent < np.arange(len(parent))):
        return np.arange(len(parent))
    order, row = _depth_first(parent)
    if row is not None:
        raise SwcError(f"row {row} is its own ancestor, expected a forest; make it a root (-1)")
    return order


def _checked_parent(tree: Tree) -> np.ndarray:
    """The parent column, checked to be usable as row indexes."""
    parent = np.asarray(tree.parent)
    n = len(parent)
    if parent.ndim != 1 or parent.dtype.kind not in "iu":
        raise SwcError(f"parent has shape {parent.shape}, type {parent.dtype}, expected (n,) int")
    shapes = [np.shape(tree.xyz), np.shape(tree.radius), np.shape(tree.type)]
    if shapes != [(n, 3), (n,), (n,)]:
        raise SwcError(f"xyz, radius, type: shapes {shapes}, expected (n, 3), (n,), (n,), n={n}")
    if n and (parent.min() < -1 or parent.max() >= n):
        raise SwcError(f"parent rows run to {parent.max()}, expected -1 to {n - 1}")
    return parent.astype(np.int64, copy=False)


def _depth_first(parent: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Rows in depth-first order, and a row on a cycle, if there is one.

    Strategy: SciPy's search rescans a node's whole neighbour list at each return, which takes
    quadratic time in a forest of many roots. So each node gets two links, to its first child and
    to its next sibling (roots are siblings). Following "child" before "sibling" gives the same
    order.
    """
    n = len(parent)
    by_parent = np.argsort(parent, kind="stable")
    sorted_parent = parent[by_parent]
    same = sorted_parent[1:] == sorted_parent[:-1]
    sibling = np.full(n, -1)
    sibling[by_parent[:-1][same]] = by_parent[1:][same]
    starts = by_parent[np.r_[True, ~same]] if n else by_parent
    roots = starts[parent[starts] < 0]
    child = np.full(n, -1)
    starts = starts[parent[starts] >= 0]
    child[parent[starts]] = starts

    links = np.stack([child, sibling], axis=1)
    ends = np.cumsum((links >= 0).sum(axis=1))
    targets = links[links >= 0]
    graph = csr_array((np.ones(len(targets)), targets, np.r_[0, ends]), shape=(n, n))
    order = np.empty(0, dtype=np.int64)
    if len(roots):
        found = depth_first_order(graph, roots[0], directed=True, return_predecessors=False)
        order = found.astype(np.int64)
    if len(order) == n:
        return order, None
    # Every row not reached leads into a cycle, in fewer steps than there are rows.
    row = int(np.setdiff1d(np.arange(n), order)[0])
    for _ in range(n):
        row = int(parent[row])
    return order, row


def take(tree: Tree, rows: np.ndarray) -> Tree:
    """The nodes `rows` (n,) in that order; nodes without their parent become roots."""
    place = np.full(len(tree.parent) + 1, -1)
    place[rows] = np.arange(len(rows))
    parent = place[tree.parent[rows]]  # the last entry of `place` is for the roots' index -1
    xyz, radius, kind = tree.xyz[rows], tree.radius[rows], tree.type[rows]
    return replace(tree, xyz=xyz, radius=radius, type=kind, parent=parent)


# Writing --------------------------------------------------------------------------------------


def write_swc(
    path: str | Path,
    tree: Tree,
    comment: str = "",
    units: str = "voxels",
    spacing: Sequence[float] | None = None,
) -> Path:
    """Write a tree with ids 1 to n, parents before children, -1 at every root.

    The header gives the unit, the voxel size if known, and the place of the first voxel, in
    SNT's wording, so that `read_swc` converts a file in µm back to voxels.

    Nothing is written if the tree has no nodes, contains a cycle, or has values not finite.

    Parameters
    ----------
    path : str or Path
        Written atomically.
    tree : Tree
        Coordinates get four decimals (six in µm), radii six significant digits.
    comment : str
        Lines for the header, without ``#``.
    units : str
        ``voxels``, or ``um``: coordinates times `spacing`, radii times the geometric mean of dy
        and dx. Most programs expect µm.
    spacing : sequence of float, optional
        (dz, dy, dx) in µm; needed for ``um``.
    """
    path = Path(path)
    if units not in ("voxels", "um") or (units == "um" and spacing is None):
        raise SettingsError(f"units={units!r}: expected 'voxels', or 'um' and the spacing")
    try:
        order = topological_order(tree)
        if units == "um":
            tree = transform(tree, 1 / check_spacing(spacing))
    except NeurolibError as error:
        raise SwcError(f"{path.name}: {error}") from None
    if not len(order):
        raise SwcError(f"{path.name}: a tree without nodes, expected at least one; nothing written")
    if not (np.isfinite(tree.xyz).all() and np.isfinite(tree.radius).all()):
        raise SwcError(f"{path.name}: coordinates or radii are not finite; nothing written")
    tree = take(tree, order)
    parent = np.where(tree.parent < 0, -1, tree.parent + 1)
    digits = 6 if units == "um" else 4
    # Rounding first and adding 0 keeps "-0.0000" out of the file.
    xyz = np.round(tree.xyz, digits) + 0.0
    ids = np.arange(1, len(order) + 1)
    columns = (c.tolist() for c in (ids, tree.type, *xyz.T, tree.radius, parent))
    frame = [f"All positions and radii in {units}"]
    if spacing is not None:
        frame.append("Voxel separation (x,y,z): " + ", ".join(f"{d:g}" for d in spacing[::-1]))
    frame.append("The centre of the first voxel is at 0, 0, 0")
    at = f"{{:.{digits}f}}"
    line = f"{{}} {{}} {at} {at} {at} {{:.6g}} {{}}\n"
    nodes = "".join(line.format(*values) for values in zip(*columns, strict=True))
    head = "".join(f"# {line}\n" for line in [*comment.splitlines(), *frame])
    rest = f"# {COLUMNS}\n{nodes}"
    return write_text(path, head + seal_text(head + rest) + rest)


# Shape ----------------------------------------------------------------------------------------


def components(tree: Tree) -> np.ndarray:
    """Number of each node's tree, (n,) int, from 0 in order of appearance."""
    n, (child, parent) = len(tree.parent), edges(tree)
    graph = coo_array((np.ones(len(child)), (child, parent)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def edges(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (child, parent) of the edges of a tree, each (m,)."""
    child = np.flatnonzero(tree.parent >= 0)
    return child, tree.parent[child]


def length(tree: Tree, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> float:
    """Summed length of all edges, in voxels, or in µm with `spacing` (dz, dy, dx)."""
    child, parent = edges(tree)
    steps = (tree.xyz[child] - tree.xyz[parent]) * np.asarray(spacing)[::-1]
    return float(np.linalg.norm(steps, axis=1).sum())


def length_text(tree: Tree, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> str:
    """The length of a tree with its unit: µm, or voxels if the spacing is unknown."""
    unit = "voxels" if tuple(spacing) == (1, 1, 1) else "µm"
    return f"{length(tree, spacing):.{0 if unit == 'voxels' else 1}f} {unit}"


def tips(tree: Tree) -> np.ndarray:
    """Rows of the end points: nodes with at most one neighbour.

    A root at the end of a neurite counts too, so that the choice of the root does not matter.
    """
    return np.flatnonzero(_degree(tree) <= 1)


def branch_points(tree: Tree) -> np.ndarray:
    """Rows of the branch points: nodes with three neighbours or more, for any root."""
    return np.flatnonzero(_degree(tree) >= 3)


def _degree(tree: Tree) -> np.ndarray:
    child = tree.parent >= 0
    return np.bincount(tree.parent[child], minlength=len(tree.parent)) + child


def densify(
    tree: Tree, step: float = 0.5, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Sample all edges so that no two neighbouring samples are more than `step` apart.

    Returns x, y, z (m, 3) of every node and of the samples between, and their radii (m,), linear
    between nodes. Points are multiplied by `spacing` (dz, dy, dx); the radii, which are measured
    in the plane, by the geometric mean of dy and dx. `step` is in voxels, or in the unit of
    `spacing`.
    """
    check_range("step", step)
    scale = np.asarray(spacing, dtype=np.float64)
    xyz, radius = tree.xyz * scale[::-1], tree.radius * np.sqrt(scale[1] * scale[2])
    child, above = edges(tree)
    edge = xyz[child] - xyz[above]
    line, t = _cuts(np.linalg.norm(edge, axis=1) / step)
    between = xyz[above[line]] + edge[line] * t[:, None]
    between[t == 1] = xyz[child]
    thickness = radius[above[line]] * (1 - t) + radius[child[line]] * t
    roots = tree.parent < 0
    return np.concatenate([xyz[roots], between]), np.concatenate([radius[roots], thickness])


def repeated(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items repeated `count` (n,) times: the item of each repetition, and its number from 0."""
    item = np.repeat(np.arange(len(count)), count)
    return item, np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)


def _cuts(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut lines into equal pieces of at most one step: which line, and where along it (0 to 1)."""
    pieces = np.maximum(np.ceil(steps), 1).astype(np.int64)
    line, number = repeated(pieces)
    return line, (number + 1) / pieces[line]


def resample(tree: Tree, step: float) -> Tree:
    """Place nodes evenly along every unbranched path, at most `step` voxels apart.

    Roots, tips and branch points stay. Between them, samples of the polyline replace the nodes;
    radii are interpolated, and the type is that of the next original node away from the root.
    """
    check_range("step", step)
    topological_order(tree)
    tree = take(tree, _depth_first(np.asarray(tree.parent))[0])
    n, root = len(tree.parent), tree.parent < 0
    key = root | (np.bincount(tree.parent[~root], minlength=n) != 1)

    # Strategy: in depth-first order an only child directly follows its parent, so each path
    # between key nodes is a run of consecutive rows. All paths are laid end to end along one axis
    # of arc length, with gaps of 1, and sampled by one np.interp.
    ends, firsts = np.flatnonzero(key & ~root), np.flatnonzero(~root & key[tree.parent])
    if not len(ends):
        return tree
    starts, sizes = tree.parent[firsts], ends - firsts + 2
    path = np.repeat(np.arange(len(ends)), sizes)
    offset = np.cumsum(sizes) - sizes
    rows = firsts[path] + np.arange(len(path)) - offset[path] - 1
    rows[offset] = starts
    steps = np.linalg.norm(np.diff(tree.xyz[rows], axis=0, prepend=tree.xyz[rows[:1]]), axis=1)
    steps[offset] = 1.0
    axis = np.cumsum(steps)
    begin, extent = axis[offset], axis[offset + sizes - 1] - axis[offset]
    line, t = _cuts(extent / step - 1e-9)
    s = begin[line] + extent[line] * t
    # Rounding can put the last position just beyond the end of the path.
    kind = tree.type[rows[np.minimum(np.searchsorted(axis, s), len(rows) - 1)]]
    xyz = np.stack([np.interp(s, axis, tree.xyz[rows, k]) for k in range(3)], axis=1)
    radius = np.interp(s, axis, tree.radius[rows])
    last = np.flatnonzero(t == 1)
    xyz[last], radius[last], kind[last] = tree.xyz[ends], tree.radius[ends], tree.type[ends]

    # New rows: the roots, then the paths; the start of a path is its first sample's parent.
    roots = np.flatnonzero(root)
    new_row = np.full(n, -1)
    new_row[roots] = np.arange(len(roots))
    new_row[ends] = len(roots) + last
    parent = len(roots) + np.arange(len(line)) - 1
    parent[np.append(0, last[:-1] + 1)] = new_row[starts]
    columns = (tree.xyz, xyz), (tree.radius, radius), (tree.type, kind)
    xyz, radius, kind = (np.concatenate([old[roots], new]) for old, new in columns)
    parent = np.concatenate([np.full(len(roots), -1), parent])
    return replace(tree, xyz=xyz, radius=radius, type=kind, parent=parent)


# Frames ---------------------------------------------------------------------------------------


def transform(
    tree: Tree,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    origin: float | Sequence[float] = 0.0,
    flip_y: int | None = None,
) -> Tree:
    """Convert a tree to the voxel frame of its image.

    In this order: divide coordinates by the spacing, subtract the origin, mirror y. Radii are
    divided by the geometric mean of dy and dx.

    Parameters
    ----------
    tree : Tree
    spacing : sequence of float
        (dz, dy, dx), the size of a voxel in the units of the tree; 1 for voxels.
    origin : float or (z, y, x)
        The centre of the first voxel in the tree's frame, in voxels: 0 (ours), 0.5 (corners at
        integers), 1 (counting from one).
    flip_y : int, optional
        Height of the image in voxels, for files whose y axis points up: y becomes
        ``flip_y - 1 - y``.
    """
    scale = check_spacing(spacing)
    shift = np.broadcast_to(np.asarray(origin, dtype=np.float64), 3)
    if not np.isfinite(shift).all():
        raise SwcError(f"origin is {origin}, expected one or three finite numbers (z, y, x)")
    xyz = tree.xyz / scale[::-1] - shift[::-1]
    if flip_y is not None:
        xyz[:, 1] = flip_y - 1 - xyz[:, 1]
    return replace(tree, xyz=xyz, radius=tree.radius / np.sqrt(scale[1] * scale[2]))


# Tree and image -------------------------------------------------------------------------------


def check_pair(tree: Tree, volume_shape: Sequence[int], name: str) -> None:
    """Refuse a tree if less than half of it lies in an image of `volume_shape` (z, y, x)."""
    if not len(tree.parent):
        raise DataError(f"{name}: the SWC has no nodes, expected a tree")
    inside = _inside(tree, volume_shape)
    if inside >= 0.5:
        return
    low, high = tree.xyz.min(axis=0), tree.xyz.max(axis=0)
    span = ", ".join(f"{k} {a:.0f} to {b:.0f}" for k, a, b in zip("xyz", low, high, strict=True))
    raise DataError(
        f"{name}: {inside:.0%} of the SWC lies in the image of shape {tuple(volume_shape)} "
        f"(z, y, x), expected most of it; it spans {span}: correct it with neurolib.swc.transform"
    )


def check_frame(tree: Tree, volume: Volume, name: str) -> None:
    """Refuse a tree that does not lie on the neurites of its image; see `fit`."""
    result = fit(tree, volume)
    if not result.fits:
        raise DataError(
            f"{name}: the SWC does not lie on the neurites of its image ({result.follows:.0%} "
            f"brighter than its surroundings): {result}; correct it with neurolib.swc.transform"
        )


def _inside(tree: Tree, shape: Sequence[int]) -> float:
    """Share of nodes within the image; voxels extend half a voxel around their centres."""
    upper = np.asarray(shape)[::-1] - 0.5
    return float(((tree.xyz >= -0.5) & (tree.xyz < upper)).all(axis=1).mean())


# The largest shift that `fit` tries, in voxels along each axis.
REACH = 8.0
# Share of a tree that must be brighter than its surroundings, AROUND voxels away. Measured: 0.89 to
# 1.00 for the right trees of 10 real and 32 rendered stacks, also with noise; at most 0.67 for 41
# trees of other neurons in their best frames. Of 32 trees at half their scale, one reaches
# 0.86 and passes, the others at most 0.79.
FOLLOWS, AROUND = 0.85, 6.0
# Voxels of tree that each change of a frame needs as evidence. Of 70 pieces of other neurons,
# 15 to 130 voxels long, 24 found a frame without this bound, and 2 find one with it.
EVIDENCE = 20.0


@dataclass(frozen=True)
class Fit:
    """How well a tree lies on the bright structures of an image.

    contrast: mean intensity on the tree minus that of the image, in standard deviations of the
    image; inside: share of the nodes within the image; follows: share of the tree in the image
    that is brighter than its surroundings, about 0.5 for any line and `FOLLOWS` or more along
    neurites; hint: a frame that fits clearly better, with its contrast and `follows`, or empty.
    """

    contrast: float
    inside: float
    follows: float
    hint: str
    hint_contrast: float = np.nan
    hint_follows: float = np.nan

    @property
    def fits(self) -> bool:
        """Whether the tree lies on its image without a change of frame."""
        return not self.hint and self.follows >= FOLLOWS and self.inside >= 0.5

    def __str__(self) -> str:
        if self.hint:
            return (
                f"another fits better: {self.hint} (contrast {self.hint_contrast:.2f}, "
                f"{self.hint_follows:.0%} brighter than its surroundings)"
            )
        if self.fits:
            return "no other fits better"
        return (
            f"no frame that was tried fits: where it belongs, at least {FOLLOWS:.0%} of a tree is "
            "brighter than its surroundings; it may be another neuron's, wrongly scaled, or far off"
        )


def fit(tree: Tree, volume: Volume) -> Fit:
    """Compare the image on and off the tree, in its frame and in others often confused with it.

    They differ by mirrored axes, exchanged x and y and, if the volume has a spacing, by coordinates
    in µm or nm, in cubic voxels, or multiplied by the spacing; each is tried with a shift of up to
    8 voxels along every axis. A frame needs 20 voxels of tree for each of its changes.
    """
    if not len(tree.parent):
        raise SwcError("a tree without nodes cannot be compared with an image")
    data = np.asarray(volume.data)
    data = data.astype(np.float32) if data.dtype == np.float16 else data  # SciPy has no float16
    shape = np.array(data.shape)
    # A fixed sample of the image: a million voxels give its mean to a thousandth of its spread.
    rng = np.random.default_rng(0)
    sample = data[tuple(rng.integers(0, shape[:, None], size=(3, 1_000_000)))].astype(np.float64)
    # Saturated spots must not outweigh the neurites; training uses the same ceiling.
    ceiling = np.percentile(sample, 99.8)
    ceiling = ceiling if ceiling > sample.min() else sample.max()
    sample = np.minimum(sample, ceiling)
    off, spread = sample.mean(), sample.std() or 1.0
    # In nanometres a tree is a thousand times as long.
    points = densify(tree, max(1.0, np.ptp(tree.xyz) / 1000))[0][:, ::-1]
    points = points[rng.permutation(len(points))[:4000]]

    def at(zyx: np.ndarray) -> np.ndarray:
        # Outside counts as background: leaving the image must not make a frame look better.
        on = map_coordinates(data, zyx.T, np.float64, order=1, cval=off)
        return np.minimum(on, ceiling)

    def contrast(zyx: np.ndarray) -> float:
        return float((at(zyx).mean() - off) / spread)

    def follows(zyx: np.ndarray) -> float:
        # Means over a voxel and its neighbours reduce noise.
        steps = np.array(list(product((-1, 0, 1), repeat=3)), dtype=float)
        size = np.abs(steps).sum(axis=1)
        on = np.mean([at(zyx + step) for step in steps[size <= 1]], axis=0)
        ring = steps[size > 0] / np.linalg.norm(steps[size > 0], axis=1, keepdims=True)
        around = np.mean([at(zyx + AROUND * step) for step in ring], axis=0)
        return float((on > around + 0.02 * spread).mean())

    # Strategy: score every orientation with its best shift in whole voxels on a quarter of the
    # points. Then score the best of each number of changes on all points, in half voxels.
    best: dict[int, tuple[float, str, np.ndarray, np.ndarray]] = {}
    voxels = length(tree) / (np.linalg.norm(np.ptp(points, axis=0)) or 1.0)
    for words, frame in _orientations(points, shape, np.asarray(volume.spacing)):
        long = voxels * np.linalg.norm(np.ptp(frame, axis=0))
        shift = _best_shift(contrast, frame[::4], np.zeros(3), 1.0)
        for move in (np.zeros(3), shift):
            changes = len(words) + np.count_nonzero(move)
            # With enough changes, any short tree fits somewhere.
            if long < EVIDENCE * changes:
                continue
            score = contrast(frame[::4] + move)
            if changes not in best or score > best[changes][0]:
                best[changes] = score, words, frame, move
    within = points[((points >= -0.5) & (points < shape - 0.5)).all(axis=1)]
    here = chosen = contrast(points)
    result = Fit(here, _inside(tree, data.shape), follows(within) if len(within) else 0.0, "")
    for changes in sorted(best.keys() - {0}):
        _, words, frame, shift = best[changes]
        if shift.any():
            shift = _best_shift(contrast, frame, shift, 0.5)
        score, along = contrast(frame + shift), follows(frame + shift)
        # Among many wrong frames some lie on brighter voxels, so a frame must be good in itself,
        # and each change must be worth it: for six confocal neurons with trusted traces, no other
        # frame gained more than 5 %.
        if along >= FOLLOWS and score > max(1.1 * chosen, chosen + 0.25):
            moves = [f"{d:g} in {k}" for d, k in zip(shift, "zyx", strict=True) if d]
            parts = [*words, *(["offset by " + " and ".join(moves)] if moves else [])]
            hint = ", ".join(parts) + "?"
            result = replace(result, hint=hint, hint_contrast=score, hint_follows=along)
            chosen = score
    return result


def _orientations(
    points: np.ndarray, shape: np.ndarray, spacing: np.ndarray
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Frames that people confuse: the changes in words, and the points (n, 3) z, y, x."""
    scaled = {(): np.ones(3)}
    if (spacing != 1).any():
        scaled |= {
            ("divide by the spacing",): spacing,
            ("divide by the spacing in nm",): 1000 * spacing,
            ("multiply by the spacing",): 1 / spacing,
        }
    if spacing[0] != spacing[2]:
        ratio = spacing[0] / spacing[2]
        scaled["divide z by the ratio of its spacing to that of x",] = np.array([ratio, 1, 1])
    for scale, size in scaled.items():
        frame, room = points / size, np.array([shape[0], *[shape[1:].max()] * 2]) + 2 * REACH
        if scale and (np.ptp(frame, axis=0) > room).any():
            continue
        for exchange in ((), ("exchange x and y",)):
            turned = frame[:, [0, 2, 1]] if exchange else frame
            for flips in product((False, True), repeat=3):
                words = tuple(f"flip {k}" for k, flip in zip("zyx", flips, strict=True) if flip)
                yield scale + exchange + words, np.where(flips, shape - 1 - turned, turned)


def _best_shift(contrast, points: np.ndarray, shift: np.ndarray, step: float) -> np.ndarray:
    """The shift (z, y, x) of highest contrast, searched twice along each axis in turn."""
    shift = shift.copy()
    for axis in (0, 1, 2, 0, 1, 2):
        scores = {}
        # Zero first: of shifts with equal scores the smallest is kept.
        for size in sorted(np.arange(-REACH, REACH + step / 2, step), key=abs):
            moved = np.where(np.arange(3) == axis, size, shift)
            scores[size] = contrast(points + moved)
        best = max(scores, key=scores.get)
        # A shift along a neurite changes little and is not taken.
        kept = max(scores[0.0], contrast(points + shift))
        if scores[best] > max(1.03 * kept, kept + 0.05):
            shift[axis] = best
        elif scores[0.0] >= 0.97 * kept:
            shift[axis] = 0.0
    return shift
