"""`neurolib inspect`: facts are right, a bad file is one line, other files are still read."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr
from test_formats import DATA, multiscales, needs_data, ome_zarr
from tifffile import imread, imwrite

from neurolib import swc, volume
from neurolib.data import inspection, synthesis
from neurolib.data.formats import LazyStack
from neurolib.data.inspection import inspect_files
from neurolib.data.pairs import folder_pairs
from neurolib.errors import NeurolibError, NeurolibWarning
from neurolib.volume import read_volume, write_volume


@pytest.fixture
def folder(tmp_path):
    shape = (24, 64, 70)
    tree = synthesis.grow(3, shape)
    stack = synthesis.render(tree, shape, seed=3)
    write_volume(tmp_path / "cell.tif", stack.data, (2.0, 0.5, 0.5))
    swc.write_swc(tmp_path / "cell.swc", tree)
    return tmp_path


def facts(text):
    """The facts in a block of text, by key."""
    rows = [line.split(maxsplit=1) for line in text.splitlines()[1:]]
    return {key: value for key, value in rows}


def test_facts_of_an_image_are_numpys(folder):
    values = imread(folder / "cell.tif")
    (text,) = inspect_files([folder / "cell.tif"])
    shown = facts(text)
    assert shown["shape"].startswith("24 × 64 × 70 (z, y, x), uint8")
    assert shown["spacing"] == "2 × 0.5 × 0.5 µm (z, y, x)"
    low, middle, high = np.percentile(values, (0.5, 50, 99.8))
    assert f"{low:g}, {middle:g}, {high:g}" in shown["intensity"]
    assert shown["intensity"].startswith(f"{values.min()} to {values.max()};")


def test_what_reading_chose_and_what_is_not_known_is_said(tmp_path, folder):
    data = imread(folder / "cell.tif")
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.1, "PhysicalSizeY": 0.1}
    options = {"photometric": "miniswhite", "metadata": metadata}
    imwrite(tmp_path / "a.ome.tif", 255 - data, ome=True, **options)
    (text,) = inspect_files([tmp_path / "a.ome.tif"])
    shown = facts(text)
    said = r"1 × 1 × 1 \(z, y, x\), not known in µm: not every axis.*PhysicalSizeZ missing"
    assert re.match(f"{said}.*--spacing", shown["spacing"])
    assert shown["read"] == "stored with 0 as white (MinIsWhite), inverted"
    assert "warning" not in shown
    (text,) = inspect_files([tmp_path / "a.ome.tif"], spacing=(0.3, 0.1, 0.1))
    assert facts(text)["spacing"] == "0.3 × 0.1 × 0.1 µm (z, y, x)"
    np.save(tmp_path / "dark.npy", 255 - data)
    (text,) = inspect_files([tmp_path / "dark.npy"])
    assert facts(text)["warning"].startswith("dark structures on a bright background")


def test_of_large_planes_a_middle_one_tells_dark_from_bright(tmp_path, monkeypatch):
    for module in (inspection, volume):
        monkeypatch.setattr(module, "POLARITY", 1)
    data = np.full((5, 60, 60), 100, np.uint8)
    data[0, 30:33], data[2, 30:33] = 200, 0
    assert volume.inverted(volume.normalise(data))
    assert "warning" in inspection.volume_facts(volume.Volume(data), "a")


def test_a_length_in_voxels_is_called_that(folder):
    tree = swc.read_swc(folder / "cell.swc")
    write_volume(folder / "cell.tif", imread(folder / "cell.tif"), (2.0, 0.5, 0.5), known=False)
    *_, text = inspect_files([folder])
    assert facts(text)["length"] == f"{swc.length(tree):.0f} voxels"
    swc.write_swc(folder / "um.swc", tree, units="um", spacing=(2.0, 0.5, 0.5))
    written = (folder / "um.swc").read_text()
    for unit in ("um", "inch"):
        (folder / "um.swc").write_text(written.replace("in um", f"in {unit}"))
        (text,) = inspect_files([folder / "um.swc"])
        assert facts(text)["length"].startswith(f"{swc.length(tree):.1f} in voxels")


def test_a_large_zarr_is_not_read_whole(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(inspection, "WHOLE_ZARR", 30_000)
    monkeypatch.setattr(inspection, "WHOLE", 100_000)
    data = np.tile(imread(folder / "cell.tif"), (2, 3, 3)).astype(np.float32)
    image = multiscales(scale=(2, 0.5, 0.5))
    path = ome_zarr(tmp_path / "cell.zarr", data, image, "0.4", chunks=(8, 16, 16))
    read, get = [], LazyStack.__getitem__

    def counted(self, key):
        read.append(get(self, key).size)
        return get(self, key)

    monkeypatch.setattr(LazyStack, "__getitem__", counted)
    text, *_ = inspect_files([path, folder / "cell.swc"])
    shown = facts(text)
    assert 0 < sum(read) <= 30_000
    assert re.search(r"14 of \d+ chunks", shown["intensity"])
    assert shown["spacing"] == "2 × 0.5 × 0.5 µm (z, y, x)"
    median = float(shown["intensity"].split(": ")[1].split(", ")[1])
    assert abs(np.sum(data < median) / data.size - 0.5) < 0.1
    *_, last = inspect_files([path, folder / "cell.swc"])
    assert "not compared" in facts(last)["frame"]
    assert sum(read) <= 60_000


def test_masked_stacks_are_described_by_what_is_not_masked(tmp_path):
    data = np.zeros((4, 20, 20), np.uint16)
    data[1, 5:9] = np.arange(1, 81).reshape(4, 20)
    (text,) = inspect_files([write_volume(tmp_path / "masked.tif", data)])
    low, middle, high = np.percentile(np.arange(1, 81), (0.5, 50, 99.8))
    assert f"{low:g}, {middle:g}, {high:g} of the voxels that are not zero" in text
    assert "95.0% of the voxels" in facts(text)["zeros"]


def test_facts_of_a_tree_are_counted_from_its_lines(folder):
    lines = (folder / "cell.swc").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    (text,) = inspect_files([folder / "cell.swc"])
    shown = facts(text)
    assert shown["nodes"] == f"{len(rows)} in 1 tree"
    at = {row[0]: np.array(row[2:5], float) for row in rows}
    whole = sum(np.linalg.norm(at[r[0]] - at[r[6]]) for r in rows if r[6] != "-1")
    assert float(shown["length"].split()[0]) == pytest.approx(whole, abs=0.06)


def test_a_pair_is_compared_whatever_its_names(folder):
    assert "no other fits better" in list(inspect_files([folder]))[-1]
    tree = swc.read_swc(folder / "cell.swc")
    swc.write_swc(folder / "mirrored.swc", swc.transform(tree, flip_y=64))
    *_, last = inspect_files([folder / "mirrored.swc", folder / "cell.tif"])
    assert last.startswith("cell.tif with mirrored.swc")
    assert "another fits better: flip y? (contrast " in last
    # Several files: by name only.
    titles = [text.splitlines()[0] for text in inspect_files([folder])]
    assert titles[3:] == ["cell.tif with cell.swc", "in no pair"]


def test_trees_in_a_folder_of_their_own_find_their_images(folder, tmp_path):
    stacks, trees = tmp_path / "stacks", tmp_path / "trees"
    stacks.mkdir()
    trees.mkdir()
    image, tree = next(folder.glob("*.tif")), next(folder.glob("*.swc"))
    for name in ("one", "two"):
        shutil.copy(image, stacks / f"{name}.tif")
        shutil.copy(tree, trees / f"{name}.swc")
    (stacks / "._one.tif").write_text("of a Mac")

    def titles():
        said = list(inspect_files([stacks, trees, stacks / "one.tif"]))
        return [text.splitlines()[0] for text in said]

    assert titles()[4:] == ["one.tif with one.swc", "two.tif with two.swc"]
    shutil.copy(tree, stacks / "two.swc")  # nearer than the other of that name
    assert titles()[5:] == ["one.tif with one.swc", "two.tif with two.swc", "in no pair"]


def test_names_are_read_as_for_training_and_what_is_left_is_said(folder):
    image, tree = next(folder.glob("*.tif")), next(folder.glob("*.swc"))
    for name in ("Two.ome.tif", "three.tif", "four.tif"):
        shutil.copy(image, folder / name)
    for name in ("two.swc", "three.tif.swc", "five.swc"):
        shutil.copy(tree, folder / name)
    *_, last = said = list(inspect_files([folder]))
    titles = [text.splitlines()[0] for text in said if " with " in text.splitlines()[0]]
    with pytest.warns(NeurolibWarning, match="four.tif .no tree named four"):
        pairs = folder_pairs(folder)
    assert sorted(titles) == sorted(f"{p.image.name} with {p.swc.name}" for p in pairs)
    assert len(pairs) == 3
    assert facts(last) == {"four.tif": "no tree named four", "five.swc": "no image named five"}
    # An image alone is not missing its tree.
    assert len(list(inspect_files([image]))) == 1


def test_bad_files_are_named_and_the_others_read(folder):
    (folder / "flat.npy").write_bytes(b"not an array")
    files = [folder / "flat.npy", folder / "cell.tif", folder / "cell.swc"]
    reading = inspect_files(files)
    said = [next(reading) for _ in range(4)]
    with pytest.raises(NeurolibError, match="1 of 3 files"):
        next(reading)
    titles = [text.splitlines()[0].rpartition("/")[2] for text in said]
    assert titles == ["flat.npy", "cell.tif", "cell.swc", "cell.tif with cell.swc"]
    assert [("unusable" in text) for text in said] == [True, False, False, False]
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(NeurolibError, match=r"no images .* and no trees"):
        list(inspect_files([empty]))


def test_the_command(folder):
    command = [sys.executable, "-m", "neurolib", "inspect"]
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no other fits better" in done.stdout
    (folder / "a.txt").write_text("?")
    bad = subprocess.run([*command, folder / "a.txt"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("neurolib: 1 of 1 files")
    assert bad.stderr.count("\n") == 1


@needs_data
def test_every_real_file_is_inspected():
    """Stacks fit their trees; projections and archives are no stacks."""
    stacks = sorted((DATA / "real3d").iterdir())
    trees = sorted(path for path in DATA.rglob("*.swc") if "raw" not in path.parts)
    assert len(trees) > 60
    said = list(inspect_files([*stacks, *(p for p in trees if p not in stacks)]))
    assert not [text for text in said if "  unusable" in text]
    pairs = [text for text in said if " with " in text.splitlines()[0]]
    assert len(pairs) == sum(path.suffix == ".tif" for path in stacks)
    assert all("no other fits better" in text for text in pairs)
    for path in (*DATA.rglob("*.mip.tif"), *DATA.rglob("*.zip")):
        reading = inspect_files([path])
        assert "unusable" in next(reading)
        with pytest.raises(NeurolibError, match="1 of 1 files"):
            next(reading)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_a_stack_of_truth_values_is_described(suffix, tmp_path):
    mask = np.zeros((5, 20, 20), bool)
    mask[2, 5:15, 8] = True
    path = tmp_path / f"mask{suffix}"
    imwrite(path, mask) if suffix == ".tif" else np.save(path, mask)
    (text,) = inspect_files([path])
    assert facts(text)["intensity"].startswith("0 to 1")


def test_of_a_sparse_zarr_the_stored_chunks_are_described(tmp_path):
    attributes = {"multiscales": [multiscales()]}
    group = zarr.create_group(tmp_path / "a.zarr", zarr_format=2, attributes=attributes)
    shape, chunks = (1500, 15000, 15000), (64, 64, 64)
    array = group.create_array("0", shape=shape, chunks=chunks, dtype="u1")
    array[700:710, 7000:7100, 8000:8005] = 9
    shown = inspection.volume_facts(read_volume(tmp_path / "a.zarr", check=False), "a.zarr")
    assert re.search("0 to 9.*stored chunks", shown["intensity"])


def test_a_file_whose_partner_is_broken_is_told_so(tmp_path):
    for name in ("good", "cell"):
        image = np.zeros((5, 20, 20), np.uint8)
        image[2, 10, 3:17] = 200
        imwrite(tmp_path / f"{name}.tif", image)
    nodes = "\n".join(f"{i} 3 {x} 10 2 1 {i - 1 or -1}" for i, x in enumerate((3, 16), 1))
    (tmp_path / "good.swc").write_text(nodes)
    (tmp_path / "cell.swc").write_text("1 2 3\n")
    lines, told = [], inspect_files([tmp_path])
    with pytest.raises(NeurolibError, match="1 of 4 files cannot be used"):
        lines += told
    assert re.search(r"cell.tif\s+cell.swc cannot be used", lines[-1])
