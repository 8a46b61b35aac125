"""Data sets: pairs found, neurons kept together, splits that notice changed files."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import DATA, needs_data, ome_set
from test_formats import refusal as refused

from neurolib.blocking import Sample, every_slice, make_target, read_sample
from neurolib.data import datasets, synthesis
from neurolib.data.datasets import (
    Split,
    data_key,
    load_dataset,
    measure,
    name_from,
    read_manifest,
    rendered_pairs,
    split_by_neuron,
    write_manifest,
)
from neurolib.data.pairs import Pair, folder_pairs
from neurolib.errors import DataError, NeurolibWarning, SettingsError, SwcError, VolumeError
from neurolib.files import sha256
from neurolib.swc import Tree, read_swc, write_swc
from neurolib.volume import normalise, read_volume, write_volume

steady = settings(deadline=None, max_examples=100, derandomize=True)
SHAPE = (8, 30, 40)


def tree_of(*points):
    xyz = np.array(points, float)
    n = len(xyz)
    return Tree(xyz, np.ones(n), np.full(n, 3), np.arange(n) - 1)


TREE = tree_of((5, 6, 2), (20, 14, 4), (35, 22, 5))


def write_pair(folder, name, tree=TREE, seed=0, spacing=(2.0, 0.5, 0.5), shape=SHAPE):
    data = np.random.default_rng(seed).integers(0, 200, shape, np.uint8)
    write_volume(folder / f"{name}.tif", data, spacing)
    write_swc(folder / f"{name}.swc", tree)


def touch(folder, *names):
    """Make files of which only the names matter."""
    for name in names:
        (folder / name).touch()
    return folder


def empty_pairs(folder, *names):
    return touch(folder, *(f"{name}{suffix}" for name in names for suffix in (".tif", ".swc")))


def neurons_in(folder):
    return {pair.name: pair.neuron for pair in folder_pairs(folder)}


# ------------------------------------------------------------------------------- pairing


@pytest.mark.filterwarnings("ignore:.*left out")
def test_pairs_have_equal_names_and_everything_else_is_left_alone(tmp_path):
    empty_pairs(tmp_path, "b", "a", ".hidden")
    touch(tmp_path, "c.tif", "d.swc", "notes.txt", "a.png", "E.V3DPBD", "E.SWC", "f.eswc")
    (tmp_path / "f.zarr").mkdir()
    pairs = folder_pairs(tmp_path, style="mine")
    assert [pair.name for pair in pairs] == ["E", "a", "b", "f"]
    assert pairs[1] == Pair("a", "a", tmp_path / "a.tif", tmp_path / "a.swc", "mine")
    assert pairs[0].image.name == "E.V3DPBD"
    assert pairs[3].image.is_dir()
    assert load_dataset(tmp_path)[2].style == "real"
    assert load_dataset(str(tmp_path)) == folder_pairs(tmp_path)


@pytest.mark.parametrize(
    ("names", "neuron"),
    [
        (("in40_body", "in40_tail"), "in40"),
        (("cell-crop1", "cell-crop_2", "cell.part3", "cell tile", "cell_Left"), "cell"),
        (("n7_left", "n7_left_crop1", "n7_right_crop2"), "n7"),
        (("m_TOP", "m_Bottom"), "m"),
    ],
)
def test_crops_of_one_neuron_are_one_neuron(tmp_path, names, neuron):
    assert neurons_in(empty_pairs(tmp_path, *names)) == dict.fromkeys(names, neuron)


@pytest.mark.parametrize("name", ["sens_I4-2", "class1_sn23", "cell_1", "nobody", "body", "_body"])
def test_names_without_a_part_word_are_neurons_of_their_own(tmp_path, name):
    assert neurons_in(empty_pairs(tmp_path, name)) == {name: name}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "saved-by-a-spreadsheet"])
def test_neurons_file_goes_before_names(tmp_path, mark):
    empty_pairs(tmp_path, "x1", "x2", "y_body", "z_body")
    table = "name,remark,neuron\nx1,,X\nx2,ok,X\ny_body,,Y2\n"
    (tmp_path / "neurons.csv").write_text(mark + table, encoding="utf-8")
    assert neurons_in(tmp_path) == {"x1": "X", "x2": "X", "y_body": "Y2", "z_body": "z"}


IMAGE_ENDS = [".tif", ".TIF", ".ome.tif", ".ome.tiff", ".v3draw", ".npy"]
TREE_ENDS = [".swc", ".SWC", ".eswc", ".tif.swc", ".CNG.swc", ".v3dpbd.swc", ".ome.tif.swc"]
# Letters whose composed and decomposed forms differ, and other characters of names.
LETTERS = "äÖéñçabXYZ019_- .,"


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=5),
    data=st.data(),
)
def test_names_pair_whatever_their_suffixes_case_and_unicode_form(tmp_path_factory, names, data):
    # Distinct without case, and with no dot or blank at an end.
    names = list({name.strip(" .").casefold(): name.strip(" .") for name in names}.values())
    folder = tmp_path_factory.mktemp("pairs")
    twin, lonely = {}, set()

    def one_of(*choices):
        return data.draw(st.sampled_from(choices))

    for name in filter(None, names):
        form = one_of("NFC", "NFD"), one_of("NFC", "NFD")
        case = one_of(str, str.upper, str.lower)
        image = normalize(form[0], case(name)) + one_of(*IMAGE_ENDS)
        tree = normalize(form[1], name) + one_of(*TREE_ENDS)
        files = one_of((image, tree), (image, tree), (image,), (tree,))
        touch(folder, *files)
        if len(files) == 2:
            twin[image] = tree
        else:
            lonely |= set(files)
    if not twin:
        assert "no two with the same name" in refused(DataError, folder_pairs, folder)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pairs = folder_pairs(folder)
    assert {pair.image.name: pair.swc.name for pair in pairs} == twin
    text = " ".join(str(warning.message) for warning in said)
    assert all(f"{name} (no " in text for name in lonely)
    assert bool(lonely) == bool(said)


@pytest.mark.parametrize(
    ("files", "pairs"),
    [
        # Exact names come first; only the rest is read tolerantly.
        ("cell.tif Cell.tif cell.swc Cell.swc", {"cell": "cell.swc", "Cell": "Cell.swc"}),
        ("cell.tif cell.ome.tif cell.swc", {"cell": "cell.swc"}),
        ("a.tif a.swc A.tif a.tif.swc", {"a": "a.swc", "A": "a.tif.swc"}),
        ("cell_mask.tif cell.tif cell.swc", {"cell": "cell.swc"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_of_several_names_the_nearest_is_taken(tmp_path, files, pairs):
    touch(tmp_path, *files.split())
    assert {pair.name: pair.swc.name for pair in folder_pairs(tmp_path)} == pairs


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("CELL.tif cell.npy Cell.swc", "keep one of them"),
        ("a.tif a.swc a.ome.tif a.tif.swc", "keep one of them"),
        ("cell.tif cell.swc cell.v3draw", "two images named cell (cell.tif, cell.v3draw)"),
        ("cell.tif cell.swc cell.eswc", "two trees named cell"),
    ],
)
def test_names_that_could_be_either_are_refused(tmp_path, files, words):
    assert words in refused(DataError, folder_pairs, touch(tmp_path, *files.split()))


@pytest.mark.parametrize(
    "rows",
    [
        "x1.tif,X\nx2.tif,X",
        "x1 , X\n x2,X ",
        "X1,X\nX2,x",
        "x1.swc,X\npairs/x2.ome.tif,X",
        "x1,X\nx2,X\n,\n",
        "x1,X\nx2,X\nx1,X",
        "x1,X\nx2,X\nz_body.tif,z",
    ],
)
@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16", "cp1252"])
def test_neurons_file_is_matched_tolerantly(tmp_path, rows, code):
    empty_pairs(tmp_path, "x1", "x2", "z_body", "Zähler_tail")
    rows = f"Name, Neuron\n{rows}\nZÄHLER_tail.TIF,Zähler’s\n"
    (tmp_path / "neurons.csv").write_bytes(rows.replace("\n", "\r\n").encode(code))
    expected = {"x1": "X", "x2": "X", "z_body": "z", "Zähler_tail": "Zähler’s"}
    assert neurons_in(tmp_path) == expected


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "expected the columns name,neuron"),
        ("name;neuron\nx1;X\n", "name,neuron once each, found 'name;neuron'; save it as CSV"),
        (
            'name,neuron\nx1,"X\nx2,X\n',
            "not a CSV file (unexpected end of data); close its quotation marks",
        ),
        ("a,b\n1,2\n", "expected the columns name,neuron"),
        ("name,neuron\nx1,X\nx3,X\n", "row 3: no pair named 'x3'; expected one of x1, x2"),
        ("name,neuron\n,X\n", "row 2: no pair named ''"),
        ("name,neuron\nx1,X\nx2,\n", "row 3: no neuron for 'x2'; name it"),
        ("name,neuron\nx1,X\nx2\n", "row 3: no neuron for 'x2'"),
        ("name,neuron\nx1,X\nX1.tif,Y\n", "row 3: 'X1.tif' shows 'X' in an earlier row and"),
        ("name,neuron,neuron\nx1,X,Y\n", "once each, found 'name,neuron,neuron'"),
    ],
)
def test_tables_that_cannot_hold_are_refused(tmp_path, table, words):
    empty_pairs(tmp_path, "x1", "x2")
    (tmp_path / "neurons.csv").write_text(table)
    assert words in refused(DataError, folder_pairs, tmp_path)


def test_a_table_of_neurons_is_never_passed_over(tmp_path):
    empty_pairs(tmp_path, "x1", "x2")
    (tmp_path / "Neurons.CSV").write_text("name,neuron\nx1,X\nx2,X\n")
    assert neurons_in(tmp_path) == {"x1": "X", "x2": "X"}
    (tmp_path / "neurons.csv").symlink_to("gone.csv")
    assert "keep one of them" in refused(DataError, folder_pairs, tmp_path)
    (tmp_path / "Neurons.CSV").unlink()
    assert "cannot be read" in refused(DataError, folder_pairs, tmp_path)
    (tmp_path / "neurons.csv").unlink()
    (tmp_path / "neurons.tsv").write_text("name\tneuron\nx1\tX\nx2\tX\n")
    with pytest.warns(NeurolibWarning, match="neurons.tsv: cannot be read; save it as neurons.csv"):
        assert neurons_in(tmp_path) == {"x1": "x1", "x2": "x2"}


@pytest.mark.parametrize("blank", ["  ", "\u00a0", "\u200b ", " \ufeff"])
def test_blanks_that_nobody_sees_make_no_other_neuron(tmp_path, blank):
    empty_pairs(tmp_path, "x1", "x2")
    rows = f"name,neuron\nx1,cell 4\nx2,cell{blank}4{blank}\n"
    (tmp_path / "neurons.csv").write_text(rows, encoding="utf-8")
    assert set(neurons_in(tmp_path).values()) == {"cell 4"}


@pytest.mark.filterwarnings("ignore:.*left out")
def test_rows_of_files_without_a_partner_are_no_error(tmp_path):
    touch(tmp_path, "x1.tif", "x1.swc", "x2.tif")
    (tmp_path / "neurons.csv").write_text("name,neuron\nx1,X\nx2,X\n")
    assert neurons_in(tmp_path) == {"x1": "X"}


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("a, left", ["a, left"]),
        ("b,a, left", ["a, left", "b"]),
        ("a, left,b", ["a, left", "b"]),
        (["b", "a, left"], ["a, left", "b"]),
        (7, ["007"]),
        ("007", ["007"]),
        ("12,b", ["12", "b"]),
        (12, ["12"]),
        ("B.tif", ["b"]),
        ("fly1/12", ["fly1/12"]),
        ("12,FLY1/12.swc", ["12", "fly1/12"]),
        ("fly2/12", ["12"]),
        ("x/b, x/d", ["b", "d"]),
    ],
)
def test_names_may_be_numbers_and_hold_commas(tmp_path, asked, chosen):
    names = ("a, left", "b", "left", "007", "12", "d", "e", "fly1/12")
    pairs = [Pair(name, name, tmp_path, tmp_path, "") for name in names]
    split = split_by_neuron(pairs, held_out=asked)
    assert sorted(pair.name for pair in split.test) == sorted(chosen)
    assert "no neuron '8'" in refused(DataError, split_by_neuron, pairs, held_out=8)
    assert "no neuron 'c'" in refused(DataError, split_by_neuron, pairs, held_out="b,c")


def test_folders_without_pairs_are_refused(tmp_path):
    assert "no such folder" in refused(DataError, folder_pairs, tmp_path / "missing")
    assert "0 images and 0 SWC" in refused(DataError, folder_pairs, tmp_path)
    touch(tmp_path, "a.tif", "b.swc")
    assert "1 images and 1 SWC" in refused(DataError, folder_pairs, tmp_path)
    assert "no such folder" in refused(DataError, load_dataset, "synthetik")
    assert "no such folder" in refused(DataError, folder_pairs, tmp_path / "a.tif")


# ------------------------------------------------------------------------------- splits


def pairs_of(neurons):
    return [
        Pair(f"p{i}", neuron, Path(f"p{i}.tif"), Path(f"p{i}.swc"), "real")
        for i, neuron in enumerate(neurons)
    ]


@steady
@given(
    neurons=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=20),
    test=st.integers(0, 3),
    validation=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_no_neuron_is_in_two_splits_and_no_pair_is_lost(neurons, test, validation, seed):
    pairs = pairs_of(neurons)
    if len(set(neurons)) - test - validation < 1:
        refused(DataError, split_by_neuron, pairs, test, validation, seed)
        return
    split = split_by_neuron(pairs, test, validation, seed)
    groups = list(map(neurons_of, split))
    training = len(set(neurons)) - validation - test
    assert [len(group) for group in groups] == [training, validation, test]
    assert sorted(p.name for part in split for p in part) == sorted(p.name for p in pairs)
    assert split == split_by_neuron(pairs, test, validation, seed)
    # The draw is over neurons, so the order of the pairs does not matter.
    assert list(map(neurons_of, split_by_neuron(pairs[::-1], test, validation, seed))) == groups


def test_the_seed_draws_the_neurons():
    pairs = pairs_of("abcdefgh")
    drawn = {split_by_neuron(pairs, seed=seed).test[0].neuron for seed in range(40)}
    assert drawn == set("abcdefgh")


def neurons_of(part):
    return {pair.neuron for pair in part}


def test_held_out_neurons_are_the_test_set_by_neuron_or_pair_name():
    pairs = pairs_of("aabcde")
    split = split_by_neuron(pairs, validation=2, held_out=" c , p0 ,")
    assert (neurons_of(split.test), len(split.test)) == ({"a", "c"}, 3)
    assert len(neurons_of(split.validation)) == 2
    assert "'x'" in refused(DataError, split_by_neuron, pairs, held_out="a,x")
    assert "5 neurons" in refused(DataError, split_by_neuron, pairs, held_out="a,b,c,d")


def test_validation_neurons_can_be_named_and_are_never_drawn_for_the_test():
    pairs = pairs_of("aabcde")
    for seed in range(10):
        split = split_by_neuron(pairs, test=2, seed=seed, validate_on="a")
        assert (neurons_of(split.validation), len(split.validation)) == ({"a"}, 2)
        assert len(neurons_of(split.test) - {"a"}) == 2
    split = split_by_neuron(pairs, held_out="b,c", validate_on="p0")
    assert list(map(neurons_of, split)) == [{"d", "e"}, {"a"}, {"b", "c"}]
    assert "named in both held_out and validate_on" in refused(
        DataError, split_by_neuron, pairs, held_out="a", validate_on="p0"
    )
    assert "validate_on" in refused(DataError, split_by_neuron, pairs, validate_on="x")
    assert "5 neurons" in refused(DataError, split_by_neuron, pairs, test=4, validate_on="a")


def test_fewer_training_neurons_are_among_the_more():
    pairs = pairs_of("aabcdefg")
    parts = [split_by_neuron(pairs, held_out="b", seed=3, train=n) for n in (1, 2, 4, 5, 0)]
    sets = [neurons_of(part.train) for part in parts]
    assert [len(s) for s in sets] == [1, 2, 4, 5, 5]
    assert sets[0] < sets[1] < sets[2] < sets[3] == sets[4]
    assert all(tuple(part)[1:] == tuple(parts[0])[1:] for part in parts)
    assert "only 5 of 7" in refused(DataError, split_by_neuron, pairs, held_out="b", train=6)
    for key in ("test", "validation", "train"):
        assert f"{key}=-1" in refused(DataError, split_by_neuron, pairs, **{key: -1})


def test_a_sample_of_slices_keeps_its_place_in_space():
    image = np.arange(7 * 2 * 2, dtype=np.float32).reshape(7, 2, 2)
    whole = Sample(pairs_of("a")[0], image, (2.0, 1.0, 1.0), TREE, image, image > 3)
    third = every_slice(whole, 3)
    assert third.image[:, 0, 0].tolist() == [0, 12, 24]
    assert third.spacing == (6.0, 1.0, 1.0)
    assert third.mask.shape == third.response.shape == (3, 2, 2)
    assert every_slice(whole, 1) is whole


# ------------------------------------------------------------------------------ manifest


@pytest.fixture
def manifest(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i, name in enumerate(("a_body", "a_tail", "b", "c")):
        write_pair(data, name, seed=i)
    split = split_by_neuron(folder_pairs(data), held_out="a")
    return write_manifest(tmp_path / "run" / "split.json", split, seed=7), split


def test_manifest_gives_the_split_back(manifest):
    path, split = manifest
    assert read_manifest(path) == split
    stored = json.loads(path.read_text())
    assert stored["seed"] == 7
    assert [entry["split"] for entry in stored["pairs"]].count("test") == 2
    assert stored["pairs"][0]["image_sha256"] == sha256(stored["pairs"][0]["image"])


@pytest.mark.parametrize("kind", ["image", "swc"])
@pytest.mark.parametrize("change", ["edit", "delete"])
def test_changed_or_missing_file_is_noticed_and_named(manifest, kind, change):
    path, split = manifest
    file = getattr(split.validation[0], kind)
    if change == "edit":
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        file.unlink()
    assert str(file) in refused(DataError, read_manifest, path)


def test_data_that_are_downloaded_are_known_by_their_files(tmp_path, monkeypatch):
    monkeypatch.setenv("NEUROLIB_DATA", str(tmp_path))
    keys = set()
    for seed in range(2):
        write_pair(tmp_path / "bigneuron-janelia", "cell", seed=seed)
        keys.add(datasets.data_key("bigneuron-janelia"))
    assert len(keys) == 2


def test_a_folder_as_an_image_is_hashed_by_all_that_is_in_it(tmp_path):
    chunk = tmp_path / "cell.zarr" / "0" / "chunk"
    chunk.parent.mkdir(parents=True)
    (tmp_path / "cell.zarr" / "zarr.json").write_text("{}")
    chunk.write_bytes(b"\1\2")
    touch(tmp_path, "cell.swc")
    split = Split(tuple(folder_pairs(tmp_path)), (), ())
    path = write_manifest(tmp_path / "split.json", split, 0)
    assert read_manifest(path) == split
    chunk.rename(chunk.with_name("other"))
    assert "cell.zarr" in refused(DataError, read_manifest, path)
    chunk.with_name("other").rename(chunk)
    assert read_manifest(path) == split
    chunk.write_bytes(b"\1\3")
    assert "cell.zarr" in refused(DataError, read_manifest, path)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_set_of_ome_files_is_hashed_as_a_whole(tmp_path):
    ome_set(tmp_path, np.arange(2400, dtype=np.uint8).reshape(4, 20, 30))
    write_swc(tmp_path / "s0.swc", TREE)
    split = Split(tuple(folder_pairs(tmp_path)), (), ())
    path, key = write_manifest(tmp_path / "split.json", split, 0), data_key(str(tmp_path))
    assert read_manifest(path) == split
    with open(tmp_path / "s2.ome.tif", "ab") as file:
        file.write(b"x")
    assert data_key(str(tmp_path)) != key
    assert "s0.ome.tif" in refused(DataError, read_manifest, path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"pairs": 3}', '{"pairs": [{"name": "a"}]}', '{"pairs": [1]}']
)
def test_damaged_manifest_is_refused(tmp_path, content):
    path = tmp_path / "split.json"
    path.write_text(content)
    for file in (path, tmp_path / "missing.json"):
        assert "not a readable split" in refused(DataError, read_manifest, file)


# ------------------------------------------------------------------------------- samples


def pair_in(folder, name="cell", **changes):
    write_pair(folder, name, **changes)
    return next(pair for pair in folder_pairs(folder) if pair.name == name)


def test_sample_holds_image_tree_and_target_in_one_frame(tmp_path):
    pair = pair_in(tmp_path)
    sample = read_sample(pair, tau=0.2)
    volume = read_volume(pair.image)
    assert sample.spacing == (2.0, 0.5, 0.5)
    np.testing.assert_array_equal(sample.image, normalise(volume.data))
    np.testing.assert_allclose(sample.tree.xyz, read_swc(pair.swc).xyz)
    response, mask = make_target(sample.tree, SHAPE, (2.0, 0.5, 0.5), tau=0.2)
    np.testing.assert_array_equal(sample.response, response)
    np.testing.assert_array_equal(sample.mask, mask)
    for x, y, z in TREE.xyz.astype(int):
        assert sample.mask[z, y, x]
    assert not np.array_equal(sample.mask, read_sample(pair, "radius").mask)


def test_tree_outside_its_image_is_refused(tmp_path):
    pair = pair_in(tmp_path, tree=tree_of((100, 200, 4), (120, 210, 5), (20, 14, 4)))
    assert re.search("cell.*33%", refused(DataError, read_sample, pair))


def test_unusable_files_of_a_pair_are_named(tmp_path):
    pair = pair_in(tmp_path)
    good = pair.swc.read_text()
    pair.swc.write_text("1 2 3\n")
    assert "cell.swc" in refused(SwcError, read_sample, pair)
    pair.swc.write_text("# nothing\n")
    refused(SwcError, read_sample, pair)
    pair.swc.write_text(good)
    pair.image.write_bytes(pair.image.read_bytes()[:300])
    assert "cell.tif" in refused(VolumeError, read_sample, pair)
    pair.image.unlink()
    assert "cell.tif" in refused(VolumeError, read_sample, pair)


# ----------------------------------------------------------------------------- synthetic


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEUROLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(cache, monkeypatch):
    monkeypatch.setattr(datasets, "SYNTHETIC_COUNT", 2)
    monkeypatch.setattr(datasets, "SYNTHETIC_SHAPE", (24, 96, 96))


def hashes(pairs):
    return [(pair.name, sha256(pair.image), sha256(pair.swc)) for pair in pairs]


def changed_generator(tmp_path, monkeypatch):
    changed = tmp_path / "synthesis.py"
    changed.write_text(Path(synthesis.__file__).read_text() + "\n# changed\n")
    monkeypatch.setattr(synthesis, "__file__", str(changed))


def test_synthetic_pairs_are_the_same_wherever_they_are_made(small, cache):
    first = load_dataset("synthetic")
    made = hashes(first)
    assert [pair.name for pair in first] == ["synthetic_0", "synthetic_1"]
    assert made[0][1:] != made[1][1:]
    shutil.rmtree(cache)
    assert hashes(load_dataset("synthetic")) == made
    sample = read_sample(first[0])
    assert sample.image.shape == (24, 96, 96)
    assert sample.mask.any()
    assert first[0].style == "synthetic"


def test_synthetic_pairs_are_kept_until_the_generator_changes(small, cache, monkeypatch, tmp_path):
    made = load_dataset("synthetic")
    with monkeypatch.context() as broken:
        broken.setattr(synthesis, "grow", None)
        assert load_dataset("synthetic") == made
        changed_generator(tmp_path, broken)
        with pytest.raises(TypeError):
            load_dataset("synthetic")
    # The failed call leaves nothing.
    assert len(list(cache.iterdir())) == 1
    changed_generator(tmp_path, monkeypatch)
    assert load_dataset("synthetic")[0].image.parent != made[0].image.parent


# ------------------------------------------------------------------------------ rendered


def bent(seed, n=40):
    """A crooked neurite somewhere in a large field."""
    rng = np.random.default_rng(seed)
    steps = np.column_stack([np.full(n, 1.4), rng.normal(0, 1, (n, 2))])
    radius = np.where(np.arange(n) == 0, 3.5, 1.0)
    xyz = np.cumsum(steps, axis=0) + np.array([300.25, 411.5, 120.75])
    return Tree(xyz, radius, np.full(n, 3), np.arange(n) - 1)


@pytest.fixture
def trees(tmp_path, cache):
    folder = tmp_path / "trees"
    folder.mkdir()
    for seed, name in enumerate(("a_body", "a_tail", "b")):
        write_swc(folder / f"{name}.swc", bent(seed))
    return folder


@pytest.mark.parametrize("style", ["flylight", "confocal"])
def test_rendered_trees_are_the_given_ones_moved_to_where_their_light_is(trees, style):
    pairs = load_dataset(f"rendered-{style}:{trees}")
    assert [pair.name for pair in pairs] == ["a_body", "a_tail", "b"]
    for pair in pairs:
        assert pair.style == "rendered from gold"
        given_, cached = (np.loadtxt(path) for path in (trees / f"{pair.name}.swc", pair.swc))
        shift = cached[:, 2:5] - given_[:, 2:5]
        np.testing.assert_allclose(shift, np.rint(shift[:1]).repeat(len(shift), 0), atol=1e-9)
        np.testing.assert_array_equal(cached[:, [0, 1, 5, 6]], given_[:, [0, 1, 5, 6]])
        told = re.search(r"\(x y z\) (\S+) (\S+) (\S+) voxels", pair.swc.read_text())
        assert [float(word) for word in told.groups()] == shift[0].tolist()

        data = tifffile.imread(pair.image)
        xyz, radius = cached[:, 2:5], cached[:, 5:6]
        above = np.array(data.shape[::-1]) - 1 - (xyz + radius).max(0)
        assert (np.floor([(xyz - radius).min(0), above]) == synthesis.ROOM).all()

        projection = data.max(axis=0).astype(float)
        x, y = np.rint(xyz[:, :2]).astype(int).T
        assert np.median(projection[y, x]) > 1.5 * np.median(projection)
        # The light is on the tree, not beside it.
        z, y, x = np.rint(xyz[:, ::-1]).astype(int).T
        for beside in (data[z, y - 6, x], data[z, y + 6, x], data[z - 12, y, x]):
            assert beside.mean() < 0.7 * data[z, y, x].mean()


def test_the_default_microscope_is_that_of_the_gold_trees(trees):
    assert load_dataset(f"rendered:{trees}") == rendered_pairs(trees, "flylight")
    assert load_dataset(f"rendered:{trees}")[0] != rendered_pairs(trees, "confocal")[0]


def test_a_rendered_neuron_depends_on_its_name_and_tree_alone(trees, cache):
    _, *made = hashes(rendered_pairs(trees))
    shutil.rmtree(cache)
    (trees / "a_body.swc").unlink()
    shutil.copy(trees / "b.swc", trees / "c.swc")
    *again, other = hashes(rendered_pairs(trees))
    assert again == made
    assert other[1] != made[-1][1]


def test_an_interrupted_rendering_goes_on(trees, cache, monkeypatch):
    calls, true = [], synthesis.render_extract

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true(*args)

    monkeypatch.setattr(synthesis, "render_extract", killed)
    with pytest.raises(KeyboardInterrupt):
        rendered_pairs(trees)
    (shelf,) = cache.iterdir()
    assert len(list(shelf.iterdir())) == 1
    pairs = rendered_pairs(trees)
    assert len(calls) == 4
    assert len(list(shelf.iterdir())) == 3
    assert rendered_pairs(trees) == pairs
    assert len(calls) == 4
    shutil.rmtree(cache)
    monkeypatch.undo()
    monkeypatch.setenv("NEUROLIB_CACHE", str(cache))
    assert hashes(rendered_pairs(trees)) == hashes(pairs)


def test_only_what_has_changed_is_rendered_again(trees, monkeypatch, tmp_path):
    before = rendered_pairs(trees)
    write_swc(trees / "a_tail.swc", bent(9))
    after = rendered_pairs(trees)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert sha256(after[1].image) != sha256(before[1].image)
    np.testing.assert_allclose(
        np.diff(read_swc(after[1].swc).xyz, axis=0), np.diff(bent(9).xyz, axis=0), atol=2e-4
    )
    changed_generator(tmp_path, monkeypatch)
    assert not {pair.image for pair in rendered_pairs(trees)} & {pair.image for pair in after}


def test_a_run_can_go_over_rendered_trees(trees, tmp_path):
    (trees / "neurons.csv").write_text("name,neuron\nb,B\n")
    # Images beside the trees do not matter, not even two of one name.
    touch(trees, "b.tif", "b.v3draw", "._b.swc")
    pairs = load_dataset(f"rendered:{trees}")
    assert [pair.neuron for pair in pairs] == ["a", "a", "B"]
    split = split_by_neuron(pairs, test=1, validation=0, held_out="a")
    path = write_manifest(tmp_path / "split.json", split, 0)
    assert {e["style"] for e in json.loads(path.read_text())["pairs"]} == {"rendered from gold"}
    assert read_manifest(path) == split
    for pair in pairs:
        sample = read_sample(pair)
        z, y, x = np.rint(sample.tree.xyz[:, ::-1]).astype(int).T
        assert sample.mask[z, y, x].all()
        assert sample.image[z, y, x].mean() > 5 * sample.image[~sample.mask].mean()


def test_a_radius_that_is_not_positive_is_drawn_as_one_voxel(trees):
    lines = (trees / "b.swc").read_text().replace(" 1 ", " 0 ").splitlines()
    (trees / "b.swc").write_text("\n".join(lines) + "\n")
    broken = np.loadtxt(trees / "b.swc")
    assert (broken[1:, 5] == 0).any()
    (pair,) = (pair for pair in rendered_pairs(trees) if pair.name == "b")
    assert (np.loadtxt(pair.swc)[1:, 5] == 1).all()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("1 3 5 5 5 1 -1\n2 3 9 9\n", "line 2"),
        ("# nothing\n", "no nodes"),
        ("1 3 0 0 0 1 -1\n2 3 9000 9000 9000 1 1\n", "swc.transform"),
        ("1 3 0 0 0 1 2\n2 3 9 9 9 1 1\n", "cycle"),
    ],
    ids=["columns", "empty", "not-in-voxels", "cycle"],
)
def test_a_broken_tree_is_named_before_anything_is_rendered(trees, cache, content, complaint):
    (trees / "z.swc").write_text(content)
    message = refused(SwcError, load_dataset, f"rendered:{trees}")
    assert re.search(f"z.swc.*{complaint}", message)
    assert not cache.exists()


@pytest.mark.parametrize("mark", ["", "rendered:", "rendered-confocal:"])
def test_a_relative_folder_is_found_from_elsewhere(tmp_path, monkeypatch, mark):
    for place in ("here/trees", "there/deep"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert name_from(f"{mark}trees", tmp_path / "there/deep") == f"{mark}../../here/trees"
    assert name_from(f"{mark}{tmp_path}/here/trees", "../there") == f"{mark}../here/trees"
    assert name_from(f"{mark}none", tmp_path) == f"{mark}none"
    assert name_from("synthetic", tmp_path) == "synthetic"


def test_folders_and_styles_that_cannot_be_rendered_are_refused(trees, tmp_path):
    message = refused(DataError, load_dataset, f"rendered-cartoon:{trees}")
    for style in synthesis.STYLES:
        assert f"rendered-{style}:" in message
    (tmp_path / "empty").mkdir()
    for name, words in (
        (f"rendered-:{trees}", "rendered-:"),
        ("rendered:", "rendered:FOLDER"),
        ("rendered", "rendered:FOLDER"),
        (f"rendered:{tmp_path / 'none'}", "no such folder"),
        (f"rendered:{tmp_path / 'empty'}", "no SWC file"),
    ):
        assert words in refused(DataError, load_dataset, name)
    shutil.copy(trees / "b.swc", trees / "b.eswc")
    assert "two trees named b" in refused(DataError, rendered_pairs, trees)
    (trees / "b.eswc").unlink()
    (trees / "folder.swc").mkdir()
    assert "folder.swc" in refused(DataError, rendered_pairs, trees)


@needs_data
def test_a_rendered_gold_tree_looks_like_its_real_projection(tmp_path, cache):
    gold = DATA / "janelia_gold" / "58.swc"
    (tmp_path / "gold").mkdir()
    shutil.copy(gold, tmp_path / "gold")
    (pair,) = load_dataset(f"rendered:{tmp_path / 'gold'}")
    ours = tifffile.imread(pair.image).max(axis=0)
    x, y, _ = np.rint((read_swc(gold).xyz - read_swc(pair.swc).xyz)[0]).astype(int)
    height, width = ours.shape
    real = tifffile.imread(gold.with_suffix(".mip.tif"))[y : y + height, x : x + width]

    def alike(image):
        return np.corrcoef(image.ravel(), real.ravel())[0, 1]

    assert real.shape == ours.shape
    assert alike(ours) > 0.6
    assert max(alike(ours[::-1]), alike(ours[:, ::-1])) < 0.2
    # In register to the voxel.
    for step in (-1, 1):
        assert max(alike(np.roll(ours, step, axis)) for axis in (0, 1)) < alike(ours)


# ------------------------------------------------------------------------------- measure


@pytest.mark.filterwarnings("ignore:.*left out")
def test_measure_takes_pairs_or_their_folder(tmp_path):
    for seed, name in enumerate(("a", "b")):
        tree = tree_of((5, 6, 2), (20, 14, 4), (35, 22, 5 + seed))
        write_pair(tmp_path, name, tree, seed, (1.0, 1.0, 1.0), shape=(30, 50, 60))
    rows = measure(tmp_path)
    assert rows == measure(folder_pairs(tmp_path)) == measure(str(tmp_path))
    for name, row in zip("ab", rows, strict=True):
        tree, volume = read_swc(tmp_path / f"{name}.swc"), read_volume(tmp_path / f"{name}.tif")
        expected = synthesis.statistics(tree) | synthesis.image_statistics(volume, tree)
        assert row == expected
    (tmp_path / "a.tif").unlink()
    assert measure(tmp_path) == rows[1:]
    (tmp_path / "b.tif").unlink()
    assert [list(row) for row in measure(tmp_path)] == [list(synthesis.GOLD_RANGES)] * 2


def test_pairs_are_measured_with_their_channel_and_spacing(tmp_path):
    data = np.random.default_rng(0).integers(0, 200, (30, 2, 50, 60), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "ZCYX"})
    write_swc(tmp_path / "a.swc", TREE, units="um", spacing=(2.0, 0.5, 0.5))
    (row,) = measure(load_dataset(tmp_path, channel=1, spacing="1,0.5,0.5"))
    volume = read_volume(tmp_path / "a.tif", channel=1, spacing=(1.0, 0.5, 0.5))
    tree = read_swc(tmp_path / "a.swc", (1.0, 0.5, 0.5))
    assert row == synthesis.statistics(tree) | synthesis.image_statistics(volume, tree)


def test_what_cannot_be_measured_is_named(tmp_path):
    assert "no such folder" in refused(DataError, measure, tmp_path / "none")
    assert "no SWC" in refused(DataError, measure, tmp_path)
    write_swc(tmp_path / "cell.swc", tree_of((5, 6, 2)))
    assert "cell.swc" in refused(SwcError, measure, tmp_path)
    pair = pair_in(tmp_path)
    write_volume(pair.image, np.eye(*SHAPE[1:], dtype=np.float32)[None].repeat(8, 0))
    assert "cell.tif" in refused(SettingsError, measure, [pair])
    write_pair(tmp_path, "cell", replace(TREE, xyz=TREE.xyz + 1000))
    assert "cell.tif" in refused(SwcError, measure, [pair])
