"""Fetching the Janelia neurons from a local server that misbehaves."""

import hashlib
import io
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
import servers
import test_formats

from neurolib import blocking
from neurolib.data import bigneuron, datasets, download
from neurolib.data.pairs import folder_pairs
from neurolib.errors import DataError, SettingsError

ROOT = "gold166/p_checked7_janelia_flylight_part1"
SWC = b"# gold\n1 1 2 3 1 1.5 -1\n2 3 12 9 2 1 1\n3 3 20 14 3 1 2\n"


def v3draw(seed=0):
    """A stack in Vaa3D's raw format."""
    data = np.random.default_rng(seed).integers(0, 255, (5, 16, 24), np.uint8)
    return test_formats.v3draw(data)


def archive_of(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def neuron(name, folder=ROOT, suffix=".v3draw", content=None):
    image = f"{folder}/{name}/{name}{suffix}"
    return {image: content or v3draw(), f"{image}.ano_stamp_2015_06_17_11_23.swc": SWC}


@pytest.fixture(scope="module")
def release():
    """45 Janelia neurons in two parts, neurons of other groups, and other files."""
    members = {"gold166/readme.txt": b"166 neurons"}
    for i in range(45):
        part = ROOT if i < 24 else ROOT.replace("checked7", "checked6").replace("part1", "part2")
        name = f"GMR_57C10_AD_01-m-A-2011100{i}_B5-left_optic_lobe.v3draw.extract_{i % 3}"
        members |= neuron(name, part, content=v3draw(i))
    members[f"{ROOT}/{name}/{name}.v3draw_app2.swc"] = b"an automatic tracing"
    members |= neuron("ChaMARCM-F000006", "gold166/p_checked7_taiwan_flycirciut")
    members[f"__MACOSX/{ROOT}/x/._x.v3draw"] = b"resource fork"
    return archive_of(members)


@pytest.fixture
def server(release):
    with servers.serve(release) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Short waiting times, no address of the user's, and the test's own cache."""
    servers.hurry(monkeypatch)
    # All of them are set here, so that changes by tests are undone.
    for name, value in (("CACHE", tmp_path), ("BIGNEURON_URL", ""), ("BIGNEURON_SHA256", "")):
        monkeypatch.setenv(f"NEUROLIB_{name}", str(value))
    return tmp_path / "bigneuron"


def fetch_janelia(url, sha256=""):
    os.environ |= {"NEUROLIB_BIGNEURON_URL": url, "NEUROLIB_BIGNEURON_SHA256": sha256}
    return bigneuron.fetch_janelia()


def hash_of(data):
    return hashlib.sha256(data).hexdigest()


def refused(*args, error=DataError):
    return test_formats.refusal(error, fetch_janelia, *args)


def leftovers(cache):
    """Files that are neither a record nor an unfinished transfer."""
    return sorted(p.name for p in cache.rglob("*") if p.suffix not in (".json", ".part"))


# ---------------------------------------------------------------------------- the good way


def test_release_becomes_a_folder_of_pairs_of_whole_neurons(server, release):
    folder = fetch_janelia(server.url("good"), hash_of(release))
    pairs = folder_pairs(folder)
    assert len(list(folder.iterdir())) == 90
    assert len(pairs) == len({pair.neuron for pair in pairs}) == 45
    assert all(pair.image.suffix == ".v3draw" for pair in pairs)
    assert all(pair.swc.read_bytes() == SWC for pair in pairs)
    name = "GMR_57C10_AD_01-m-A-20111007_B5-left_optic_lobe.v3draw.extract_1"
    (seventh,) = [pair for pair in pairs if pair.name == name]
    assert seventh.image.read_bytes() == v3draw(7)
    sample = blocking.read_sample(seventh)
    assert sample.image.shape == (5, 16, 24)
    assert sample.mask.any()
    # The paper's numbers of neurons can be split off.
    split = datasets.split_by_neuron(pairs, test=4, validation=3)
    assert [len(part) for part in split] == [38, 3, 4]


def test_second_call_asks_no_server(server, release, cache):
    folder = fetch_janelia(server.url("good"), hash_of(release))
    asked = len(server.requests)
    assert fetch_janelia(server.url("good"), hash_of(release)) == folder
    assert fetch_janelia(server.url("good")) == folder
    assert len(server.requests) == asked == 1
    assert not list(cache.glob("*.zip")), "the archive is kept beside what was in it"


def test_the_data_set_is_found_by_its_name_and_its_hash_holds(server, release, cache):
    fetch_janelia(server.url("good"), hash_of(release).upper())
    pairs = datasets.load_dataset("bigneuron-janelia")
    assert len(pairs) == 45
    assert pairs[0].image.is_relative_to(cache)
    assert "downloaded before" in refused(server.url("good"), "0" * 64)
    assert "hexadecimal" in refused(server.url("good"), "12")


# ----------------------------------------------------------------------------- transfers


def test_dropped_connections_are_resumed_where_they_stopped(server, release):
    fetch_janelia(server.url("drops"), hash_of(release))
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in server.requests]
    step = len(release) // 10 + 1
    assert starts == [step * i for i in range(10)]


def test_a_later_call_goes_on_with_what_an_earlier_one_left(server, release, cache, monkeypatch):
    monkeypatch.setattr(download, "MAX_CONNECTIONS", 4)
    message = refused(server.url("drops"), hash_of(release))
    assert re.search("4 connections .*run it again to resume", message)
    assert leftovers(cache) == []
    monkeypatch.setattr(download, "MAX_CONNECTIONS", 100)
    fetch_janelia(server.url("drops"), hash_of(release))
    assert len(server.requests) == 10


def test_transfer_that_was_whole_but_not_yet_renamed_is_recognised(server, release, cache):
    fetch_janelia(server.url("good"), hash_of(release))
    (record,) = cache.glob("*.json")
    shutil.rmtree(next(cache.glob("janelia*")))
    record.with_suffix(".part").write_bytes(release)
    folder = fetch_janelia(server.url("good"))
    assert len(list(folder.iterdir())) == 90
    # More bytes than the server has belong to another file: it starts again.
    shutil.rmtree(folder)
    record.with_suffix(".part").write_bytes(release + b"more")
    assert len(list(fetch_janelia(server.url("good")).iterdir())) == 90


def test_a_server_that_asks_to_wait_gets_its_time(server, release, cache, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    fetch_janelia(server.url("asks_to_wait"), hash_of(release))
    assert [wait for wait in waits if wait] == [1.0]
    monkeypatch.setattr(download, "MAX_WAIT", 0.5)
    server.requests.clear()
    shutil.rmtree(cache)
    fetch_janelia(server.url("asks_to_wait"), hash_of(release))
    assert [wait for wait in waits if wait] == [1.0, 0.5]


# What other bad servers do to a transfer is tested in test_fly_larva.py.


def test_server_that_never_stops_is_stopped(server, release, cache, monkeypatch):
    monkeypatch.setattr(bigneuron, "MAX_ARCHIVE", 10 << 20)
    assert "more bytes" in refused(server.url("endless"), hash_of(release))
    assert sum(p.stat().st_size for p in cache.iterdir()) <= 10 << 20


def test_no_server_and_no_address_are_data_errors(server):
    nobody = "http://127.0.0.1:9/gold166.zip"
    assert nobody in refused(nobody)
    for bad in ("gold166.zip", "ftp://127.0.0.1/gold166.zip", "http://", "http://[/"):
        assert "check the address" in refused(bad)


def test_archive_that_does_not_fit_on_the_disk_is_not_begun(server, release, monkeypatch):
    full = bigneuron.shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(bigneuron.shutil, "disk_usage", lambda _: full)
    assert "do not fit" in refused(server.url("good"), hash_of(release))


# --------------------------------------------------------------------------------- content


@pytest.mark.filterwarnings("ignore:.*no hash of this archive")
@pytest.mark.parametrize("way", ["altered", "short", "page"])
def test_wrong_bytes_are_refused_and_neither_kept_nor_remembered(server, release, cache, way):
    known = hash_of(release)
    for sha256, words in ((known, f"expected {known}"), ("", "cannot be unpacked")):
        assert words in refused(server.url(way), sha256)
        assert list(cache.iterdir()) == []


def test_unknown_hash_is_recorded_at_the_first_download_and_enforced_later(server, release, cache):
    with pytest.warns(UserWarning, match=hash_of(release)):
        folder = fetch_janelia(server.url("good"))
    shutil.rmtree(folder)
    server.data = archive_of(neuron("another"))
    assert "expected " + hash_of(release) in refused(server.url("good"))
    server.data = release
    assert fetch_janelia(server.url("good")) == folder
    (record,) = cache.glob("*.json")
    record.write_text("{")
    assert "not a readable record" in refused(server.url("good"))


@pytest.mark.parametrize(
    "name",
    ["../stray.swc", "/stray.swc", "gold166/../../stray.swc", "..\\stray.swc", "C:/stray.swc"],
)
def test_members_that_point_outside_are_refused(server, cache, name):
    server.data = archive_of(neuron("cell") | {name: b"evil"})
    assert "points outside" in refused(server.url("good"), hash_of(server.data))
    assert not list(cache.parents[1].rglob("*stray*"))
    assert leftovers(cache) == []


def test_archive_that_would_unpack_far_beyond_the_release_is_refused(server, cache, monkeypatch):
    monkeypatch.setattr(bigneuron, "MAX_UNPACKED", 1 << 20)
    server.data = archive_of(neuron("bomb", content=bytes(2 << 20)))
    assert len(server.data) < 1 << 16
    assert "unpacked" in refused(server.url("good"), hash_of(server.data))
    assert leftovers(cache) == []


def test_archive_without_janelia_neurons_is_refused(server):
    server.data = archive_of(neuron("cell", "gold166/p_checked7_taiwan_flycirciut"))
    assert "not the gold166" in refused(server.url("good"), hash_of(server.data))


def test_encrypted_archive_is_refused(server):
    data = bytearray(archive_of(neuron("cell")))
    # The flag "encrypted" in the local header and in the central directory of each member.
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 1)
    server.data = bytes(data)
    assert "cannot be unpacked" in refused(server.url("good"), hash_of(server.data))


def test_cache_that_cannot_be_written_is_a_settings_error(server, cache):
    cache.write_text("not a folder")
    assert "cannot write here" in refused(server.url("good"), error=SettingsError)


def fetch(server, members):
    """Contents of the files that are made of an archive, by name."""
    server.data = archive_of(members)
    folder = fetch_janelia(server.url("good"), hash_of(server.data))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_gold_tree_is_told_from_automatic_ones_and_images_from_copies(server):
    members = neuron("cell_1", suffix=".v3dpbd", content=b"compressed")
    members |= {
        f"{ROOT}/cell_1/cell_1.tif": b"a copy",
        f"{ROOT}/cell_1/cell_1.v3dpbd_app2.swc": b"automatic",
        f"{ROOT}/cell_1/cell_1.v3dpbd.marker": b"1,2,3",
        f"{ROOT}/plain/plain.v3dpbd": b"image",
        f"{ROOT}/plain/proofread.swc": SWC,
    }
    expected = {"cell_1.swc": SWC, "cell_1.v3dpbd": b"compressed"}
    assert fetch(server, members) == expected | {"plain.swc": SWC, "plain.v3dpbd": b"image"}


def test_images_that_share_a_folder_keep_their_own_trees(server):
    files = {"n1.tif": b"one", "n10.tif": b"ten", "n10.swc": b"# ten\n" + SWC}
    members = files | {"n1.tif_stamp_2015_06_15.swc": SWC}
    made = fetch(server, {f"{ROOT}/{name}": content for name, content in members.items()})
    assert made == files | {"n1.swc": SWC}


def test_images_without_a_sure_tree_are_left_out_and_named(server):
    members = neuron("good")
    members |= {
        f"{ROOT}/lonely/lonely.v3dpbd": b"image",
        f"{ROOT}/two/two.v3dpbd": b"image",
        f"{ROOT}/two/two.v3dpbd_a.swc": SWC,
        f"{ROOT}/two/two.v3dpbd_b.swc": SWC,
    }
    with pytest.warns(UserWarning, match="2 images .*lonely, two"):
        made = fetch(server, members)
    assert made == {"good.swc": SWC, "good.v3draw": v3draw()}


def test_names_are_made_safe_and_an_image_in_two_parts_is_one_neuron(server):
    again = ROOT.replace("part1", "part2")
    members = neuron("a cell*") | neuron("same") | neuron("same", again, content=v3draw(9))
    trees, images = ("a_cell_.swc", "same.swc"), ("a_cell_.v3draw", "same.v3draw")
    assert fetch(server, members) == dict.fromkeys(trees, SWC) | dict.fromkeys(images, v3draw())
