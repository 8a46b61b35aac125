"""SWC files and trees, against independent oracles."""

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import fuzz, mutate

from neurolib.data.synthesis import grow, render
from neurolib.errors import DataError, NeurolibError, SettingsError, SwcError
from neurolib.swc import (
    Tree,
    branch_points,
    check_frame,
    check_pair,
    components,
    densify,
    fit,
    length,
    length_text,
    read_swc,
    resample,
    take,
    tips,
    topological_order,
    transform,
    write_swc,
)
from neurolib.volume import Volume, read_volume

DATA = Path(__file__).parents[1].parent / "shared" / "data"
CASES = int(os.environ.get("NEUROLIB_FUZZ", "3000"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")

Y_SHAPE = """\
# a root, a branch point, two tips
1 1 10 10 10 3 -1
2 3 14 10 10 1 1
3 3 14 13 14 1 2
4 3 14 10 20 2 2
"""


def save(folder, content, name="tree.swc"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder, content, name="tree.swc"):
    return read_swc(save(folder, content, name))


def written(path):
    """The words of each node's line in a file."""
    return [row.split() for row in path.read_text().splitlines() if row[0] != "#"]


def nodes(tree):
    """The tree as a sorted list of nodes with their parents' content, for any row order."""

    def content(row):
        return (*np.round(tree.xyz[row], 6), round(float(tree.radius[row]), 6), int(tree.type[row]))

    return sorted((content(row), content(p) if p >= 0 else ()) for row, p in enumerate(tree.parent))


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("xyz", "type", "parent"))


def tree_of(points, parent, radius=1.0, kind=1):
    n = len(points)
    xyz, radius = np.reshape(points, (n, 3)).astype(float), np.resize(radius, n).astype(float)
    return Tree(xyz, radius, np.resize(kind, n), np.array(parent, dtype=int))


NOTHING, LONE = tree_of([], []), tree_of([[0, 0, 0]], [-1])


def forest(seed, n, roots=2, spread=40.0):
    """A random forest with short edges, parents first."""
    rng = np.random.default_rng(seed)
    parent = np.array([-1 if k < roots else rng.integers(max(0, k - 6), k) for k in range(n)])
    xyz = rng.uniform(0, spread, (n, 3))
    for k in range(roots, n):
        xyz[k] = xyz[parent[k]] + rng.normal(0, 3, 3)
    return Tree(xyz, rng.uniform(0.5, 3, n), rng.integers(1, 5, n), parent)


def moved(tree, factor=(1, 1, 1), by=(0, 0, 0)):
    return replace(tree, xyz=tree.xyz * factor + by)


@st.composite
def trees(draw):
    """Any forest, with coordinates of four decimals."""
    n = draw(st.integers(1, 30))
    number = st.integers(-(10**7), 10**7).map(lambda k: k / 10**4)
    xyz = [[draw(number) for _ in range(3)] for _ in range(n)]
    radius = draw(st.lists(st.integers(1, 99999), min_size=n, max_size=n))
    kind = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    parent = [-1] + [draw(st.integers(-1, k - 1)) for k in range(1, n)]
    return Tree(np.array(xyz), np.array(radius) / 1000, np.array(kind), np.array(parent))


# Reading ------------------------------------------------------------------------------------


def test_reads_columns_into_rows(tmp_path):
    tree = read(tmp_path, Y_SHAPE)
    assert tree.xyz.tolist() == [[10, 10, 10], [14, 10, 10], [14, 13, 14], [14, 10, 20]]
    assert tree.radius.tolist() == [3, 1, 1, 2]
    assert tree.type.tolist() == [1, 3, 3, 3]
    assert tree.parent.tolist() == [-1, 0, 1, 1]
    assert tree.repairs == ()
    assert tree.xyz.dtype == np.float64
    assert tree.parent.dtype.kind == "i"


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("crlf", lambda t: t.replace("\n", "\r\n")),
        ("cr", lambda t: t.replace("\n", "\r")),
        ("tabs", lambda t: t.replace(" ", "\t")),
        ("wide", lambda t: t.replace(" ", "   ")),
        ("indented", lambda t: "  " + t.replace("\n", "  \n  ")),
        ("commas", lambda t: t.replace(" ", ",")),
        ("commas and blanks", lambda t: t.replace(" ", ", ")),
        ("float ids", lambda t: t.replace("\n2 3", "\n2.0 3.0").replace(" 1 1\n", " 1 1.0\n")),
        ("bom", lambda t: "\ufeff" + t),
        ("inline comment", lambda t: t.replace("-1\n", "-1 # soma\n")),
        ("comments between", lambda t: t.replace("\n3 3", "\n# half\n\n#\n3 3")),
        ("extra columns", lambda t: t.replace("-1\n", "-1 0 0 7 8.5\n")),
        ("no last line end", lambda t: t.rstrip("\n")),
        ("exponents", lambda t: t.replace("14 10 20", "1.4e1 1E+1 2e+01")),
        ("latin", lambda t: ("# Zürich µm\n" + t).encode("latin-1")),
        ("utf-16", lambda t: t.encode("utf-16")),
    ],
)
def test_reads_every_dialect_alike(tmp_path, label, change):
    plain = read(tmp_path, Y_SHAPE)
    tree = read(tmp_path, change(Y_SHAPE))
    assert same(tree, plain)
    assert np.array_equal(tree.radius, plain.radius)
    assert tree.repairs == ()


def test_reads_eswc(tmp_path):
    text = "#name x\n##n,type,x,y,z,radius,parent,seg_id,level,mode,timestamp,feature_value\n"
    rows = "1 2 5 6 7 1 -1 0 1 0 1 0 0\n2 2 6 6 7 1 1 0 1 0 1 0 0\n"
    assert read(tmp_path, text + rows, "a.eswc").parent.tolist() == [-1, 0]


FLAT, HEADING = "radius not positive, set to 1", "line 1: heading without # skipped"
REORDERED = "lines 1, 2: listed before its parent, nodes reordered"


@pytest.mark.parametrize(
    ("text", "x", "parent", "repair"),
    [
        (
            "7 3 0 0 0 1 -1\n3 3 1 0 0 1 7\n9 3 2 0 0 1 7\n1 3 3 0 0 1 3",
            range(4),
            [-1, 0, 0, 1],
            "",
        ),
        ("0 3 0 0 0 1 -1\n1 3 1 0 0 1 0", [0, 1], [-1, 0], ""),
        # Depth first from node 3: 3, 2, then 2's children 1 and 4 in the order of the file.
        (
            "1 3 0 0 0 1 2\n2 3 1 0 0 1 3\n3 3 2 0 0 1 -1\n4 3 9 0 0 1 2",
            [2, 1, 0, 9],
            [-1, 0, 1, 1],
            REORDERED,
        ),
        (
            "1 3 0 0 0 1 1\n2 3 1 0 0 1 1",
            [0, 1],
            [-1, 0],
            "line 1: its own parent, taken as a root",
        ),
        ("1 3 0 0 0 1 0", [0], [-1], "line 1: no such parent, taken as a root (-1)"),
        (
            "#\n1 3 0 0 0 1 -1\n2 3 1 0 0 1 1\n\n2 3 1 0 0 1 1\n3 3 2 0 0 1 2",
            [0, 1, 2],
            [-1, 0, 1],
            "line 5: repeats an earlier node, dropped",
        ),
        ("1 3 0 0 0 0 -1\n2 3 1 0 0 -2 1", [0, 1], [-1, 0], f"lines 1, 2: {FLAT}"),
        ("1 3 0 0 0 NA -1\n2 3 1 0 0 None 1", [0, 1], [-1, 0], f"lines 1, 2: {FLAT}"),
        ("// id , type , x y z\n1 3 0 0 0 1 -1", [0], [-1], HEADING),
        ("id type x y z r parent\n1 3 0 0 0 1 -1", [0], [-1], HEADING),
    ],
)
def test_repairs_and_reports(tmp_path, text, x, parent, repair):
    tree = read(tmp_path, text)
    assert tree.xyz[:, 0].tolist() == list(x)
    assert tree.parent.tolist() == parent
    assert tree.repairs == ((repair,) if repair else ())
    assert (tree.radius == 1).all()


def test_long_repairs_are_counted_not_listed(tmp_path):
    rows = [f"{k} 3 {k} 0 0 0 {k - 1 if k > 1 else -1}" for k in range(1, 1001)]
    tree = read(tmp_path, "\n".join(rows))
    assert tree.repairs == (f"lines 1, 2, 3 and 997 more: {FLAT}",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no nodes"),
        ("# only\n# comments\n", "no nodes"),
        ("1 3 0 0 0 1 -1\n2 3 1 0 0 1\n", "line 2: found 6 columns, expected 7"),
        ("1 3 0 0 0 1 -1\n\n2 3 one 0 0 1 1\n", "line 3: found 'one', expected a number"),
        ("1 3 0 0 0 1 -1\n2 3 1_0 0 0 1 1\n", "line 2: found '1_0'"),
        ("1 3 0 0 0 1 -1\n# x\n2 3 nan 0 0 1 1\n", "line 3: x is nan"),
        ("1 3 0 0 0 1 -1\n2 3 0 0 0 inf 1\n", "line 2: radius is inf"),
        ("1 3 0 0 1e999 1 -1\n", "line 1: z is inf"),
        ("1 3 0 0 0 1 -1\n2.5 3 0 0 0 1 1\n", "line 2: id is 2.5"),
        ("1 3 0 0 0 1 -1\n2 3 0 0 0 1 0.5\n", "line 2: parent is 0.5"),
        ("1 3.5 0 0 0 1 -1\n", "line 1: type is 3.5"),
        ("1 3 0 0 0 1 -1\n2 3 0 4e12 0 1 1\n", "line 2: y is 4e\\+12, expected at most 1e9"),
        ("7e17 3 0 0 0 1 -1\n", "line 1: an id above 2\\^53 that has lost digits"),
        ("1 3 0 0 0 1 99999999999999999999\n", "line 1: parent is 1e\\+20"),
        ("1 3 0 0 0 1 -1\n1 3 5 0 0 1 -1\n", "line 2: id 1 is already used in line 1"),
        ("1 3 0 0 0 1 -1\n2 3 1 0 0 1 3\n3 3 1 0 0 1 2\n", "its own ancestor"),
        ("1 3 0 0 0 1 2\n2 3 0 0 0 1 3\n3 3 0 0 0 1 1\n", "its own ancestor"),
        # Node 2 hangs on the cycle 3-4 but is not part of it.
        (
            "1 3 0 0 0 1 -1\n2 3 1 0 0 1 3\n3 3 1 0 0 1 4\n4 3 1 0 0 1 3\n",
            "line [34]: node [34] is its own ancestor",
        ),
        ("1 3 1,5 2,5 3,5 1,0 -1\n", "1 columns|commas|columns"),
        ("1 3 1,5 2,5 3,5 1,0 -1 0\n", "line 1: found commas inside numbers"),
        ("1 3 0 0\x000 1 -1\n", "binary"),
        (",id,type,x,y,z,r,parent\n0,1,3,5,6,7,1,-1\n", "line 1: x is column 4, expected"),
        ("id type x z y r parent\n1 3 0 0 0 1 -1\n", "line 1: y is column 5, expected"),
        ("id type x y r z parent\n1 3 0 0 0 1 -1\n", "line 1: z is column 6, expected"),
        ("# id type z y x radius parent\n1 3 0 0 0 1 -1\n", "x is column 5, expected"),
        ("# Columns: id type z y x radius parent\n1 3 0 0 0 1 -1\n", "x is column 5, expected"),
        ("# id type z y x radius parent unit: um\n1 3 0 0 0 1 -1\n", "x is column 5, expected"),
        ("1,3,1,5,2,5,3,5,1,0,-1\n", "line 1: found commas inside numbers"),
        ("-1 1 1 1 1 1 -1\n2 3 2 2 2 1 -1\n", "line 1: id -1, which also marks roots"),
        ("1 NA 0 0 0 1 -1\n", "line 1: found 'NA', expected a number"),
    ],
)
def test_refuses_with_the_line(tmp_path, text, words):
    with pytest.raises(SwcError, match=words) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith("tree.swc: ")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.swc", tmp_path):
        with pytest.raises(SwcError, match="cannot be read"):
            read_swc(path)


def test_large_files_never_need_the_line_parser(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    table = rng.uniform(1, 500, (35_000, 4)).round(3)
    rows = [f"{k + 1} 3 {x} {y} {z} {r} {k or -1}" for k, (x, y, z, r) in enumerate(table)]
    # The line parser, for files that NumPy refuses, takes ten times as long.
    monkeypatch.setattr("neurolib.swc._parse_lines", None)
    for order in (rows, rows[::-1]):
        tree = read_swc(save(tmp_path, "\n".join(order)))
        assert np.array_equal(tree.xyz, table[:, :3])
        assert np.array_equal(tree.parent, np.arange(-1, 34_999))


def test_order_of_a_star_of_200000_children():
    n = 200_000
    order = topological_order(tree_of(np.zeros((n, 3)), [n - 1] * (n - 1) + [-1]))
    assert order[0] == n - 1
    assert order[1:].tolist() == list(range(n - 1))


@settings(max_examples=30, deadline=None)
@given(tree=trees(), lost=st.sets(st.integers(1, 30)))
def test_a_cropped_tree_has_a_root_for_every_lost_parent(tmp_path_factory, tree, lost):
    path = write_swc(tmp_path_factory.mktemp("swc") / "a.swc", tree)
    rows = [row for row in written(path) if int(row[0]) not in lost]
    if not rows:
        return
    path.write_text("\n".join(map(" ".join, rows)))
    kept = {row[0] for row in rows}
    orphans = sum(row[6] not in kept and row[6] != "-1" for row in rows)
    back = read_swc(path)
    assert (back.parent < 0).sum() == orphans + sum(row[6] == "-1" for row in rows)
    assert bool(orphans) == any("no such parent, taken as a root" in r for r in back.repairs)


@settings(max_examples=30, deadline=None)
@given(tree=trees(), first=st.integers(2**53, 2**63 - 2000), glue=st.sampled_from([" ", ",", "\t"]))
def test_ids_beyond_exact_floats(tmp_path_factory, tree, first, glue):
    path = write_swc(tmp_path_factory.mktemp("swc") / "a.swc", tree)
    rows = written(path)
    for row in rows:
        row[0] = str(int(row[0]) + first)
        row[6] = row[6] if row[6] == "-1" else str(int(row[6]) + first)
    path.write_text("\n".join(map(glue.join, rows)))
    back = read_swc(path)
    assert same(back, tree)
    assert back.repairs == ()


@pytest.mark.parametrize("word", ["nan", "NaN", "-NaN", "0", "-1", "-9999"])
def test_a_radius_nobody_measured_is_one(tmp_path, word):
    tree = read(tmp_path, f"1 3 0 0 0 {word} -1\n2 3 5 0 0 2 1\n2 3 5 0 0 2 1\n")
    assert tree.radius.tolist() == [1, 2]
    assert f"line 1: {FLAT}" in tree.repairs


# Somata of three points ---------------------------------------------------------------------


ARMS = [
    (4, 3, 5, 0, 0, 1, 1),
    (5, 3, 9, 0, 0, 1, 4),
    (6, 3, -5, 1, 0, 1, 1),
    (7, 3, -9, 1, 0, 1, 6),
]


def table(rows, shift=(0, 0, 0)):
    moved = [(i, t, *np.add(p, shift).tolist(), r, up) for i, t, *p, r, up in rows]
    return "\n".join(" ".join(map(str, row)) for row in moved)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    radius=st.floats(0.5, 40),
    shift=st.tuples(*[st.integers(-500, 500)] * 3),
    hangs_on=st.sampled_from([1, 2, 3]),
)
def test_three_point_soma_is_one_sphere(tmp_path_factory, seed, radius, shift, hangs_on):
    way = np.random.default_rng(seed).normal(size=3)
    way *= radius / np.linalg.norm(way)
    soma = [(1, 1, 0, 0, 0, radius, -1)]
    sides = [(k, 1, *(sign * way).round(2).tolist(), radius, 1) for k, sign in ((2, -1), (3, 1))]
    rows = [*soma, *sides, *ARMS[:3], (*ARMS[2][:6], hangs_on), ARMS[3]]
    del rows[5]
    random.Random(seed).shuffle(rows)
    folder = tmp_path_factory.mktemp("swc")
    one, three = read(folder, table(soma + ARMS, shift)), read(folder, table(rows, shift))
    assert nodes(three) == nodes(one)
    assert any("three-point soma" in repair for repair in three.repairs)
    assert (len(tips(three)), len(branch_points(three))) == (2, 0)
    assert length(three) == pytest.approx(length(one))


@pytest.mark.parametrize(
    "sides",
    [
        [(2, 1, 0, -5, 0, 5, 1), (3, 1, 5, 0, 0, 5, 1)],  # at a right angle
        [(2, 1, 0, -9, 0, 5, 1), (3, 1, 0, 9, 0, 5, 1)],  # longer than the sphere
        [(2, 1, 0, -5, 0, 2, 1), (3, 1, 0, 5, 0, 2, 1)],  # a spindle
        [(2, 3, 0, -5, 0, 5, 1), (3, 3, 0, 5, 0, 5, 1)],  # dendrites
        [(2, 1, 0, -5, 0, 5, 1)],
    ],
)
def test_other_somata_keep_their_points(tmp_path, sides):
    tree = read(tmp_path, table([(1, 1, 0, 0, 0, 5, -1), *sides, *ARMS]))
    assert len(tree.parent) == 5 + len(sides)
    assert tree.repairs == ()


# Headers with a frame -----------------------------------------------------------------------


NODE = "1 3 40 20 8 2 -1\n2 3 80 20 8 2 1\n"


@pytest.mark.parametrize(
    ("head", "spacing", "first", "radius", "said"),
    [
        ("# OFFSET 40.0 30.0 10.0", None, (80, 50, 18), 2, "OFFSET 40, 30, 10 added"),
        ("# offset: -1, 2e1, 0", None, (39, 40, 8), 2, "OFFSET -1, 20, 0 added"),
        ("# SCALE 0.5 0.5 2", None, (40, 20, 8), 2, "SCALE 0.5, 0.5, 2 not used"),
        ("# units: microns", None, (40, 20, 8), 2, "unit microns, not converted"),
        ("# Coordinates in µm", (1, 1, 1), (40, 20, 8), 2, "unit µm, converted to voxels of 1"),
        ("# Coordinates in nm", (1, 1, 1), (0.04, 0.02, 0.008), 0.002, "unit nm, converted to"),
        ("# Coordinates in µm", (2, 0.5, 0.5), (80, 40, 4), 4, "unit µm, converted to voxels"),
        (
            '# Meta: {"units": "8 nanometer"}',
            (0.016,) * 3,
            (20, 10, 4),
            1,
            "8 nanometer, converted to voxels",
        ),
        ("# x, y, z in nm", (0.004, 0.004, 0.004), (10, 5, 2), 0.5, "unit nm, converted to"),
        ("# Unit = nm", (0.002, 0.004, 0.004), (10, 5, 4), 0.5, "unit nm, converted to voxels"),
        (
            "# All positions and radii in um\n# Voxel separation (x,y,z): 0.5, 0.5, 2.0",
            None,
            (80, 40, 4),
            4,
            "converted to voxels of 0.5, 0.5, 2 µm",
        ),
        (
            "# All positions and radii in nanometers\n# Voxel separation (x,y,z): 4, 4, 2",
            (0.004, 0.008, 0.008),
            (5, 2.5, 2),
            0.25,
            "of 0.008, 0.008, 0.004 µm (x, y, z); the header has 4, 4, 2 nanometers",
        ),
        *[
            (
                f"# All positions and radii in {unit}\n# Voxel separation (x,y,z): 0.5, 0.5, 2.0",
                spacing,
                (80, 40, 4),
                4,
                "unit of the voxel separation, converted to voxels of 0.5, 0.5, 2 (x, y, z)",
            )
            for unit, spacing in (("inch", None), ("cm", (3, 1, 1)), ("unknown", None))
        ],
    ],
)
def test_comments_that_tell_the_frame(tmp_path, head, spacing, first, radius, said):
    tree = read_swc(save(tmp_path, f"{head}\n{NODE}"), spacing)
    assert tree.xyz[0].tolist() == pytest.approx(first)
    assert tree.radius.tolist() == pytest.approx([radius] * 2)
    (repair,) = tree.repairs
    assert said in repair


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ("voxel units, x y z = column,row,slice", False),
        ("OFFSET 0 0 0\n# SCALE 1.0 1.0 1.0", False),
        ("after Um and others", False),
        ("All positions and radii in voxels\n# Voxel separation (x,y,z): 0.5, 0.5, 2", False),
        ("All positions and radii in inch\n# Voxel separation (x,y,z): 1, 1, 1", False),
        ("Voxel separation (x,y,z): 0, 0, 0", False),
        ("units: um or voxels, nobody knows", True),
        ("units: 4x4x40 nm", True),
        ("units: [8, 8, 8] nanometer", True),
        ("units: um (x, y), nm (z)", True),
        ("Coordinates in voxels, radii in um", True),
        ("units: angstrom", True),
        ("coordinates traced in 2019 on 5 um sections", True),
        ("all values shrunk: section thickness 50 microns", True),
        ("xyz resolution 0.35 0.35 1.0 um", True),
        ("id type x y z radius parent", False),
        ("SWC format: n type x y z radius parent", False),
        ("Columns: id, type, x, y, z, radius, parent", False),
        ("x, y, z and parent are from SNT", False),
        ("parent trees: see the paper; x y in voxels", False),
        ("OFFSET 40 30", True),
        ("scale: 0.5", True),
    ],
)
def test_comments_that_change_nothing_and_those_that_cannot_be_used(tmp_path, head, named):
    tree = read_swc(save(tmp_path, f"# {head}\n{NODE}"), (2, 0.5, 0.5))
    assert tree.xyz.tolist() == [[40, 20, 8], [80, 20, 8]]
    assert len(tree.repairs) == named
    assert all(f"{head!r} not used, expected" in repair for repair in tree.repairs)


# Round trip ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(tree=trees())
def test_round_trip_is_exact(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("swc") / "a.swc"
    back = read_swc(write_swc(path, tree))
    assert same(back, tree)
    assert np.array_equal(back.radius, tree.radius)
    assert back.repairs == ()


@settings(max_examples=30, deadline=None)
@given(tree=trees(), seed=st.integers(0, 2**32))
def test_permuted_lines_give_the_same_tree(tmp_path_factory, tree, seed):
    path = write_swc(tmp_path_factory.mktemp("swc") / "a.swc", tree)
    lines = path.read_text().splitlines()
    random.Random(seed).shuffle(lines)
    path.write_text("\n".join(lines))
    back = read_swc(path)
    assert nodes(back) == nodes(tree)
    assert (back.parent < np.arange(len(back.parent))).all()


@settings(max_examples=20, deadline=None)
@given(tree=trees(), seed=st.integers(0, 2**32))
def test_written_files_are_parent_first_with_ids_from_one(tmp_path_factory, tree, seed):
    mixed = take(tree, np.random.default_rng(seed).permutation(len(tree.parent)))
    path = write_swc(tmp_path_factory.mktemp("swc") / "a.swc", mixed, "two\nlines")
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[:2] == ["# two", "# lines"]
    assert head[-1] == "# id type x y z radius parent"
    body = written(path)
    assert [int(row[0]) for row in body] == list(range(1, len(body) + 1))
    assert all(row[6] == "-1" or 1 <= int(row[6]) < int(row[0]) for row in body)
    assert sum(row[6] == "-1" for row in body) == len(set(components(mixed).tolist()))
    assert nodes(read_swc(path)) == nodes(tree)


@settings(max_examples=30, deadline=None)
@given(tree=trees(), spacing=st.tuples(*[st.floats(0.05, 20)] * 3), given=st.booleans())
def test_micrometres_come_back_as_voxels(tmp_path_factory, tree, spacing, given):
    path = write_swc(tmp_path_factory.mktemp("swc") / "a.swc", tree, "a", "um", spacing)
    columns = np.array(written(path), dtype=float)
    assert np.allclose(columns[:, 2:5], tree.xyz * spacing[::-1], atol=1e-5)
    assert np.allclose(columns[:, 5], tree.radius * (spacing[1] * spacing[2]) ** 0.5, 1e-5)
    back = read_swc(path, spacing if given else None)
    assert take(back, np.arange(1)).spacing == resample(back, 1.0).spacing == back.spacing
    assert np.allclose(back.xyz, tree.xyz, 1e-4, 1e-3)
    assert np.allclose(back.radius, tree.radius, 1e-4)
    assert "unit um, converted to voxels" in back.repairs[-1]


def stack_tree():
    """A soma and three neurites; its edges run along all axes."""
    points = [[20, 20, 5], [25, 20, 5], [40, 24, 9], [60, 24, 12], [20, 28, 5], [20, 50, 14]]
    radius = [4, 1, 1.5, 1, 1, 0.5, 1]
    return tree_of([*points, [10, 9, 1]], [-1, 0, 1, 2, 0, 4, 0], radius, [1, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("name", ["morphio", "neurom", "navis"])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 0.5, 0.5), (0.3, 0.7, 0.9)])
def test_other_programs_read_the_length_that_we_report(tmp_path, name, spacing):
    program = pytest.importorskip(name)
    tree = stack_tree()
    path = write_swc(tmp_path / "a.swc", tree, units="um", spacing=spacing)
    # Two of the three take the first node outside the soma as the beginning of a neurite.
    inner = (tree.parent == 0) & (name != "navis")
    steps = (tree.xyz - tree.xyz[tree.parent]) * spacing[::-1]
    stems = np.linalg.norm(steps, axis=1)[inner].sum()
    if name == "morphio":
        sections = program.Morphology(str(path)).iter()
        theirs = sum(np.linalg.norm(np.diff(s.points, axis=0), axis=1).sum() for s in sections)
    elif name == "neurom":
        theirs = program.get("total_length", program.load_morphology(path))
    else:
        theirs = program.read_swc(path).cable_length
    assert theirs == pytest.approx(length(tree, spacing) - stems, rel=1e-5)
    unit = "voxels" if spacing == (1, 1, 1) else "µm"
    number, shown = length_text(tree, spacing).split()
    assert shown == unit
    assert float(number) == pytest.approx(length(tree, spacing), abs=0.5)


@pytest.mark.parametrize("units", [{"units": "um"}, {"units": "mm", "spacing": (1, 1, 1)}])
def test_units_need_their_spacing(tmp_path, units):
    with pytest.raises(SettingsError, match="expected 'voxels', or 'um' and the spacing"):
        write_swc(tmp_path / "a.swc", stack_tree(), **units)
    with pytest.raises(SwcError, match="three positive numbers"):
        write_swc(tmp_path / "a.swc", stack_tree(), units="um", spacing=(1, 0, 1))
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_what_is_no_forest(tmp_path):
    ok = tree_of(np.zeros((2, 3)), [-1, 0])
    bad = {
        "its own ancestor": {"parent": np.array([1, 0])},
        "expected -1 to 1": {"parent": np.array([-1, 5])},
        "not finite": {"xyz": np.full((2, 3), np.nan)},
        "shapes": {"radius": np.ones(3)},
        "int": {"parent": np.array([-1.0, 0.0])},
    }
    for words, change in bad.items():
        with pytest.raises(SwcError, match=words):
            write_swc(tmp_path / "bad.swc", Tree(**{**vars(ok), **change}))
    with pytest.raises(SwcError, match="without nodes"):
        write_swc(tmp_path / "bad.swc", NOTHING)
    assert list(tmp_path.iterdir()) == []


def test_small_radii_and_negative_zero_survive(tmp_path):
    tree = tree_of([[-1e-9, 0, 0]], [-1], 1.25e-5)
    path = write_swc(tmp_path / "a.swc", tree)
    assert "-0.0000" not in path.read_text()
    assert read_swc(path).radius.tolist() == [1.25e-5]


# Shape --------------------------------------------------------------------------------------


def test_tips_and_branch_points_do_not_depend_on_the_root(tmp_path):
    tree = read(tmp_path, Y_SHAPE)
    for one in (tree, replace(tree, parent=np.array([1, -1, 1, 1]))):
        assert tips(one).tolist() == [0, 2, 3]
        assert branch_points(one).tolist() == [1]
    assert tips(LONE).tolist() == [0]
    assert branch_points(LONE).tolist() == []


def test_length_in_voxels_and_micrometres(tmp_path):
    tree = read(tmp_path, Y_SHAPE)
    assert length(tree) == pytest.approx(4 + 5 + 10)
    # Edge 2-3 runs 3 in y and 4 in z.
    assert length(tree, (2, 1, 0.5)) == pytest.approx(2 + (9 + 64) ** 0.5 + 20)


@settings(max_examples=20, deadline=None)
@given(tree=trees())
def test_components_are_those_of_a_walk_to_the_root(tree):
    def root(row):
        while tree.parent[row] >= 0:
            row = tree.parent[row]
        return int(row)

    roots = [root(row) for row in range(len(tree.parent))]
    first_seen = list(dict.fromkeys(roots))
    assert components(tree).tolist() == [first_seen.index(r) for r in roots]


def distance_by_edges(points, tree):
    """Distance of each point to the nearest edge (or lone node), one edge at a time."""
    best = np.full(len(points), np.inf)
    for row, p in enumerate(tree.parent):
        a = tree.xyz[p if p >= 0 else row]
        d = tree.xyz[row] - a
        t = np.clip((points - a) @ d / max(d @ d, 1e-300), 0, 1)
        best = np.minimum(best, np.linalg.norm(points - a - t[:, None] * d, axis=1))
    return best


@pytest.mark.parametrize("step", [0.3, 0.5, 2.0])
def test_densify_covers_every_edge(step):
    tree = forest(1, 60)
    points, radius = densify(tree, step)
    expected, thickness = [], []
    for row, p in enumerate(tree.parent):
        if p < 0:
            expected.append(tree.xyz[row])
            thickness.append(tree.radius[row])
            continue
        edge = tree.xyz[row] - tree.xyz[p]
        pieces = max(1, int(np.ceil(np.linalg.norm(edge) / step)))
        assert np.linalg.norm(edge) / pieces <= step + 1e-12
        for k in range(1, pieces + 1):
            expected.append(tree.xyz[p] + edge * k / pieces)
            change = tree.radius[row] - tree.radius[p]
            thickness.append(tree.radius[p] + change * k / pieces)
    assert len(points) == len(expected)
    by_place = np.lexsort(np.round(points, 6).T)
    oracle = np.lexsort(np.round(expected, 6).T)
    assert np.allclose(points[by_place], np.array(expected)[oracle])
    assert np.allclose(radius[by_place], np.array(thickness)[oracle])


def test_densify_in_micrometres():
    tree = tree_of([[0, 0, 0], [0, 0, 3], [4, 0, 3]], [-1, 0, 1], 2)
    points, radius = densify(tree, 0.5, spacing=(2.0, 0.5, 0.5))
    # 6 µm along z and 2 µm along x.
    assert len(points) == 1 + 12 + 4
    assert points.max(axis=0).tolist() == [2, 0, 6]
    assert np.allclose(radius, 1.0)


@pytest.mark.parametrize("step", [0.7, 2.0, 1000.0])
def test_resample_keeps_key_points_and_stays_on_the_tree(step):
    def places(tree, rows):
        return set(map(tuple, tree.xyz[rows]))

    for seed in range(5):
        tree = forest(seed, 80, roots=3)
        new = resample(tree, step)
        old_key = set()
        for rows in (tips, branch_points, lambda tree: tree.parent < 0):
            assert places(new, rows(new)) == places(tree, rows(tree))
            old_key |= places(tree, rows(tree))
        assert distance_by_edges(new.xyz, tree).max() < 1e-6
        child = new.parent >= 0
        gaps = np.linalg.norm(new.xyz[child] - new.xyz[new.parent[child]], axis=1)
        assert gaps.max() <= step + 1e-6 or step == 1000.0
        assert length(new) <= length(tree) + 1e-6
        assert len(set(components(new))) == len(set(components(tree)))
        assert set(new.type) <= set(tree.type)
        if step == 1000.0:
            assert places(new, slice(None)) == old_key


def test_resample_of_a_straight_line_is_even_with_linear_radius():
    points = [[0, 0, 0], [1, 0, 0], [9, 0, 0], [10, 0, 0]]
    tree = tree_of(points, [-1, 0, 1, 2], [1, 1.1, 1.9, 2], [1, 2, 3, 4])
    new = resample(tree, 2.0)
    assert np.allclose(new.xyz[:, 0], [0, 2, 4, 6, 8, 10])
    assert np.allclose(new.radius, [1, 1.2, 1.4, 1.6, 1.8, 2])
    assert new.type.tolist() == [1, 3, 3, 3, 3, 4]
    assert new.parent.tolist() == [-1, 0, 1, 2, 3, 4]


def test_resample_survives_coincident_and_lone_nodes():
    tree = tree_of([[5, 5, 5], [5, 5, 5], [5, 5, 5], [9, 9, 9]], [-1, 0, 1, -1])
    new = resample(tree, 1.0)
    assert sorted(map(tuple, new.xyz)) == [(5, 5, 5), (5, 5, 5), (9, 9, 9)]
    assert same(resample(LONE, 1.0), LONE)


@pytest.mark.parametrize("step", [0, -1, np.nan, np.inf])
def test_steps_must_be_positive(step):
    tree = forest(0, 5)
    for function in (resample, densify):
        with pytest.raises(SettingsError, match="step"):
            function(tree, step)


# Frames -------------------------------------------------------------------------------------


def test_transform_in_its_documented_order():
    tree = tree_of([[3, 8, 30]], [-1], 2)
    moved = transform(tree, spacing=(3, 2, 0.5), origin=1)
    assert moved.xyz.tolist() == [[5, 3, 9]]
    assert moved.radius.tolist() == [2.0]
    assert transform(tree, flip_y=100).xyz.tolist() == [[3, 91, 30]]
    assert transform(tree, origin=(0.5, 0, 2)).xyz.tolist() == [[1, 8, 29.5]]
    assert tree.xyz.tolist() == [[3, 8, 30]]
    for wrong in ({"spacing": (1, 0, 1)}, {"spacing": (1, 1)}, {"origin": np.nan}):
        with pytest.raises(NeurolibError, match=r"expected .* numbers"):
            transform(tree, **wrong)


def test_flip_twice_is_nothing():
    tree = forest(3, 20)
    assert np.allclose(transform(transform(tree, flip_y=77), flip_y=77).xyz, tree.xyz)


# Tree and image -----------------------------------------------------------------------------


def painted(tree, shape):
    """An image that is bright within two voxels of the tree, with noise."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 3)
    near = distance_by_edges(grid[:, ::-1].astype(float), tree) < 2
    noise = np.random.default_rng(0).uniform(0, 40, shape)
    return Volume((noise + 200 * near.reshape(shape)).astype(np.uint8))


@pytest.fixture(scope="module")
def pair():
    points = [[6, 5, 6], [20, 9, 8], [34, 20, 12], [25, 24, 20], [42, 8, 16]]
    tree = tree_of(points, [-1, 0, 1, 2, 1])
    return tree, painted(tree, (26, 34, 50))


def test_fit_of_the_right_frame_has_no_hint(pair):
    report = fit(*pair)
    assert report.contrast > 3
    assert (report.inside, report.hint) == (1, "")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"flip_y": 34}, "flip y?"),
        ({"origin": (3.5, 0, 0)}, "offset by 3.5 in z?"),
        ({"origin": (2, 0, 0)}, "offset by 2 in z?"),
        ({"origin": (0, -4, 0)}, "offset by -4 in y?"),
        ({"flip_y": 34, "origin": (0, 0, 4)}, "flip y, offset by 4 in x?"),
        ({"origin": (0, -4, 4)}, "offset by -4 in y and 4 in x?"),
        ({"flip_y": 34, "origin": (-3, 4, 0)}, "flip y, offset by -3 in z and 4 in y?"),
    ],
)
def test_fit_names_every_change_of_a_frame(pair, change, hint):
    tree, volume = pair
    report = fit(transform(tree, **change), volume)
    assert report.contrast < fit(tree, volume).contrast / 1.1
    number = re.compile(r"-?\d+(\.\d+)?")
    assert number.sub("_", report.hint) == number.sub("_", hint)
    hinted, wanted = ([float(m[0]) for m in number.finditer(t)] for t in (report.hint, hint))
    # Along a bright tube two voxels wide, the best shift is certain to about a voxel for two axes.
    assert np.abs(np.subtract(hinted, wanted)).max(initial=0) <= (1 if len(wanted) < 2 else 1.5)


def test_fit_sees_coordinates_in_micrometres(pair):
    tree, volume = pair
    spacing = (2.0, 0.5, 0.5)
    scaled = transform(tree, spacing=tuple(1 / d for d in spacing))
    assert fit(scaled, Volume(volume.data, spacing)).hint == "divide by the spacing?"
    assert fit(tree, Volume(volume.data, spacing)).hint == ""


@pytest.fixture(scope="module")
def stacks():
    """Rendered stacks with their trees; z is coarser in the second."""
    made = []
    for seed, spacing in ((3, (1, 1, 1)), (108, (1, 0.25, 0.25))):
        tree = grow(seed, (32, 96, 96))
        stack = render(tree, (32, 96, 96), style="confocal", seed=seed)
        made.append((tree, Volume(stack.data, spacing)))
    return made


def test_right_trees_fit_and_are_not_refused(stacks):
    for tree, volume in stacks:
        result = fit(tree, volume)
        assert result.fits
        assert result.follows > 0.9
        assert str(result) == "no other fits better"
        assert check_frame(tree, volume, "a") is None
        noise = np.random.default_rng(0).normal(0, 2 * volume.data.std(), volume.data.shape)
        assert fit(tree, Volume(volume.data + noise, volume.spacing)).fits
    with pytest.raises(DataError, match=r"a: the SWC does not lie .*: flip y\?"):
        check_frame(transform(tree, flip_y=96), volume, "a")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda tree: grow(200, (32, 96, 96)),
        lambda tree: grow(207, (32, 96, 96)),
        lambda tree: moved(tree, (0.5, 0.5, 0.5)),
        lambda tree: moved(tree, (2, 2, 2)),
        lambda tree: moved(tree, (0.7, 0.7, 1)),
        lambda tree: moved(tree, by=(30, -20, 0)),
        lambda tree: moved(tree, by=(500, 0, 0)),
        lambda tree: moved(tree, (1000, 1000, 1000)),
    ],
    ids=["other", "another", "half", "double", "in y and x", "far", "outside", "nm, no spacing"],
)
def test_no_frame_is_recommended_where_none_fits(stacks, wrong):
    tree, volume = stacks[0]
    result = fit(wrong(tree), volume)
    assert result.hint == ""
    assert not result.fits
    assert "no frame that was tried fits" in str(result)


@pytest.mark.parametrize("size", [0, 8, 20])
def test_a_tree_too_short_to_tell_its_frame_gets_none(stacks, size):
    """Of twenty lines across a stack some place fits; of a right piece none fits better."""
    tree, volume = stacks[0]
    ways = np.random.default_rng(0).normal(size=(20, 3))
    for way in ways / np.linalg.norm(ways, axis=1, keepdims=True):
        line = tree_of([[40, 40, 14], ([40, 40, 14] + size * way).tolist()], [-1, 0])
        found = fit(line, volume)
        assert found.hint.count("flip") + found.hint.count(" in ") <= size // 20
    assert fit(moved(tree, (1e-3, 1e-3, 1e-3)), volume).hint == ""
    own = take(tree, np.arange(8))
    assert fit(own, volume).fits


@pytest.mark.parametrize(
    ("factor", "hint"),
    [
        ((0.25, 0.25, 1), "divide by the spacing?"),
        ((250, 250, 1000), "divide by the spacing in nm?"),
        ((4, 4, 1), "multiply by the spacing?"),
        ((1, 1, 4), "divide z by the ratio of its spacing to that of x?"),
    ],
)
def test_fit_names_the_scale(stacks, factor, hint):
    tree, volume = stacks[1]
    result = fit(moved(tree, factor), volume)
    assert result.hint == hint
    assert f"another fits better: {hint} (contrast {result.hint_contrast:.2f}, " in str(result)


def test_check_pair(pair):
    tree, volume = pair
    assert check_pair(tree, volume.data.shape, "a") is None
    with pytest.raises(DataError, match=r"a: 0% .* x 500 to 536"):
        check_pair(transform(tree, origin=(0, 0, -494)), volume.data.shape, "a")
    with pytest.raises(DataError, match="no nodes"):
        check_pair(NOTHING, (5, 5, 5), "a")


# Real data ----------------------------------------------------------------------------------


@needs_data
def test_all_real_trees_read_and_round_trip(tmp_path):
    # Raw files are unchanged; one has an id twice.
    paths = sorted(path for path in DATA.rglob("*.swc") if "raw" not in path.parts)
    assert len(paths) > 60
    for path in paths:
        tree = read_swc(path)
        rows = [r.split() for r in path.read_text(errors="replace").splitlines()]
        rows = [r for r in rows if r and not r[0].startswith("#")]
        dropped = any("dropped" in repair for repair in tree.repairs)
        assert len(tree.parent) == len(rows) or dropped
        assert (tree.parent < np.arange(len(tree.parent))).all()
        back = read_swc(write_swc(tmp_path / "copy.swc", tree))
        assert np.array_equal(back.parent, tree.parent)
        assert np.abs(back.xyz - tree.xyz).max() <= 0.5001e-4


@needs_data
@pytest.mark.parametrize("name", sorted(path.stem for path in (DATA / "real3d").glob("*.tif")))
def test_fit_on_real_pairs(name):
    tree = read_swc(DATA / "real3d" / f"{name}.swc")
    volume = read_volume(DATA / "real3d" / f"{name}.tif")
    check_pair(tree, volume.data.shape, name)
    assert fit(tree, volume).fits
    _, y, x = volume.data.shape
    assert fit(transform(tree, flip_y=y), volume).hint == "flip y?"
    assert "flip x" in fit(moved(tree, (-1, 1, 1), (x - 1, 0, 0)), volume).hint
    assert "offset by" in fit(moved(tree, by=(0, 6, -5)), volume).hint
    assert not fit(moved(tree, (0.5, 0.5, 0.5)), volume).fits
    others = sorted((DATA / "real3d").glob("*.swc"))
    other = others[(others.index(DATA / "real3d" / f"{name}.swc") + 3) % len(others)]
    assert "no frame that was tried fits" in str(fit(read_swc(other), volume))


# Fuzz ---------------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_read_as_trees(tmp_path, count_damaged):
    rng = random.Random(2)
    source = write_swc(tmp_path / "a.swc", forest(0, 40)).read_bytes()
    digits = (b"9" * 20, b"9" * 400)
    words = (b"nan", b"-1", b"1e309", *digits, b"#", b",", b"\n", b"\0", b"\xff\xfe", b" ")

    def read_tree(path):
        tree = read_swc(path)
        assert np.isfinite(tree.xyz).all()
        assert (tree.radius > 0).all()
        assert (tree.parent < np.arange(len(tree.parent))).all()
        assert (tree.parent >= -1).all()

    refused = fuzz(CASES, lambda: save(tmp_path, mutate(source, rng, words)), read_tree, SwcError)
    assert 0 < refused < CASES
    count_damaged(CASES)
