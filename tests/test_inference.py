"""Stacked segmentation: a network that changes nothing must give the volume back."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurolib import inference, segmentation
from neurolib import volume as volumes
from neurolib.devices import pick_device
from neurolib.errors import DataError, SettingsError, VolumeError, WeightsError
from neurolib.inference import (
    Tiling,
    fuse,
    predict_box,
    predict_slices,
    predict_volume,
    predicted,
)
from neurolib.network import NetworkSettings, Segmenter
from neurolib.training import save_checkpoint
from neurolib.volume import empty_level, standing_out

ROOT = Path(__file__).parents[1]

# Of noise, nothing stands out more than the rest: every tile is run.
QUIET = {"device": "cpu", "progress": False, "skip_empty": False}

steady = settings(deadline=None, max_examples=60, derandomize=True)


class Identity(torch.nn.Module):
    """Logits whose probability is the image itself."""

    def __init__(self, depth=5, block=10, predict="center"):
        super().__init__()
        self.settings = SimpleNamespace(depth=depth, block=block, predict=predict)
        self.tiles = 0

    def forward(self, blocks):
        assert blocks.ndim == 5
        assert blocks.shape[1:3] == (1, self.settings.depth)
        self.tiles += len(blocks)
        slices = blocks[:, 0]
        middle = self.settings.depth // 2
        if self.settings.predict == "center":
            slices = slices[:, middle : middle + 1]
        return torch.logit(slices.double()).float()


class Voter(Identity):
    """The probability of slice k of a block is (k + 1) / 10, whatever the image."""

    def forward(self, blocks):
        votes = (torch.arange(self.settings.depth) + 1) / 10
        return torch.logit(votes).view(1, -1, 1, 1).expand(len(blocks), -1, 10, 10)


def volume(shape, seed=0):
    # Not up to 0 and 1, whose logits are infinite.
    return np.random.default_rng(seed).uniform(0.01, 0.99, shape).astype(np.float32)


@steady
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 33), st.integers(1, 33)),
    depth=st.sampled_from([1, 3, 5, 7]),
    overlap=st.sampled_from([0, 0.1, 0.25, 0.5, 0.75, 0.9]),
    batch=st.integers(1, 9),
    predict=st.sampled_from(["center", "all"]),
)
def test_identity_gives_every_volume_back(shape, depth, overlap, batch, predict):
    image = volume(shape)
    network = Identity(depth, 10, predict)
    found = predict_volume(network, image, overlap=overlap, batch=batch, **QUIET)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, image, atol=1e-5)


@pytest.mark.parametrize(("depth", "every"), [(10, 3), (9, 2), (7, 1), (3, 5)])
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_a_sample_of_slices_is_that_of_the_whole(depth, every, batch):
    class Neighbours(Identity):
        def forward(self, blocks):
            return blocks[:, 0].mean(1, keepdim=True)

    image = volume((depth, 14, 11))
    options = QUIET | {"overlap": 0.5}
    whole = predict_volume(Neighbours(5, 10), image, **options)
    network = Neighbours(5, 10)
    found = predict_volume(network, image, batch=batch, every=every, **options)
    np.testing.assert_allclose(found, whole[::every], atol=1e-6)


def test_a_sample_of_slices_needs_a_network_that_predicts_one():
    image = volume((6, 10, 10))
    with pytest.raises(SettingsError, match="every=2: expected 1"):
        predict_volume(Identity(5, 10, "all"), image, every=2, device="cpu", progress=False)
    with pytest.raises(SettingsError, match="every=0"):
        predict_volume(Identity(), image, every=0, device="cpu", progress=False)


@pytest.mark.parametrize("predict", ["center", "all"])
def test_slices_come_in_order_without_gap(predict):
    image = volume((23, 14, 11))
    pieces = list(
        predict_slices(Identity(5, 10, predict), image, Tiling(0.5, 3, "cpu", skip_empty=False))
    )
    assert [first for first, _ in pieces] == [
        sum(len(p) for _, p in pieces[:i]) for i in range(len(pieces))
    ]
    assert len(pieces) > 5
    np.testing.assert_allclose(np.concatenate([p for _, p in pieces]), image, atol=1e-5)


def test_slices_near_the_middle_of_a_block_count_more_than_those_at_its_ends():
    """13 slices, blocks of five every three slices: centres at 0, 3, 6, 9, 12.

    The weights are a Gaussian whose standard deviation is 1/8 of the depth, as in y and x.
    """
    found = predict_volume(Voter(5, 10, "all"), volume((13, 10, 10)), overlap=0, **QUIET)
    centres = np.array([0, 3, 6, 9, 12])
    for z in range(13):
        near = centres[abs(centres - z) <= 2]
        weights = np.exp(-0.5 * ((z - near) / (5 / 8)) ** 2)
        np.testing.assert_allclose(
            found[z], np.average((z - near + 3) / 10, weights=weights), rtol=1e-5
        )


def test_a_voxel_far_from_the_middle_of_a_tile_counts_less_than_one_in_it():
    """Two tiles overlap; one says 0.2, the other 0.8: the nearer one wins."""

    class Sides(Identity):
        def forward(self, blocks):
            left = blocks[:, 0, 2, :, :1].mean((1, 2)) < 0.5
            votes = torch.where(left, 0.2, 0.8)
            return torch.logit(votes).view(-1, 1, 1, 1).expand(-1, 1, 10, 10)

    image = np.full((1, 10, 15), 0.3, np.float32)
    image[..., 5:] = 0.7
    found = predict_volume(Sides(), image, overlap=0.5, **QUIET)[0]
    np.testing.assert_allclose(found[:, :5], 0.2, rtol=1e-5)
    np.testing.assert_allclose(found[:, 10:], 0.8, rtol=1e-5)
    across = found[5]
    assert (np.diff(across[4:11]) > 0).all()
    assert across[7] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("predict", ["center", "all"])
def test_tiles_without_signal_are_not_run_and_give_zero(predict):
    image = np.zeros((9, 30, 30), np.float32)
    image[3:6, 2:8, 2:8] = volume((3, 6, 6))
    network = Identity(3, 10, predict)
    found = predict_volume(network, image, overlap=0, batch=4, **QUIET)
    # Blocks of 3 slices see the signal from centres 2 to 6, in one of nine places; 81 in all.
    assert network.tiles == 5
    np.testing.assert_allclose(found, image, atol=1e-5)
    assert (found[image == 0] == 0).all()
    empty = predict_volume(network, np.zeros_like(image), **QUIET)
    assert not empty.any()
    assert network.tiles == 5


class Rows(Identity):
    """The probability of a voxel is its row in the tile plus a tenth of its column, in hundredths.

    What a mirrored tile is given is not the mirror of what the tile is given.
    """

    def forward(self, blocks):
        votes = (torch.arange(10.0)[:, None] + torch.arange(10.0) / 10 + 1) / 100
        self.tiles += len(blocks)
        return torch.logit(votes).expand(len(blocks), 1, 10, 10)


@pytest.mark.parametrize("predict", ["center", "all"])
def test_flips_are_turned_back(predict):
    image = volume((5, 13, 17))
    network = Identity(3, 10, predict)
    options = QUIET | {"flips": True}
    np.testing.assert_allclose(predict_volume(network, image, **options), image, atol=1e-5)


def test_flips_average_the_four_mirrored_predictions():
    network, image = Rows(), volume((2, 10, 10))
    options = QUIET
    plain = predict_volume(network, image, **options)
    assert network.tiles == 2
    found = predict_volume(network, image, flips=True, **options)
    assert network.tiles == 10
    mirrored = [plain, plain[:, ::-1], plain[:, :, ::-1], plain[:, ::-1, ::-1]]
    np.testing.assert_allclose(found, np.mean(mirrored, axis=0), rtol=1e-5)
    assert np.ptp(plain) > 0.09


def test_what_stands_out_is_a_difference_of_gaussians_of_three_slices():
    image = np.zeros((5, 81, 81), np.float32)
    image[2, 40, 40] = 1
    y, x = np.mgrid[-40:41, -40:41]
    bells = [np.exp(-(y**2 + x**2) / (2 * s**2)) / (2 * np.pi * s**2) for s in (1.5, 6)]
    for z, share in enumerate((0, 1 / 3, 1 / 3, 1 / 3, 0)):
        heights = standing_out(image)[z]
        np.testing.assert_allclose(heights, share * (bells[0] - bells[1]), atol=2e-4)
        np.testing.assert_array_equal(standing_out(image, slice(z, z + 1))[0], heights)


def thread(brightness=0.5, background=0.3):
    """A bright thread in a corner of noise."""
    image = background + 0.05 * np.random.default_rng(1).standard_normal((9, 60, 60))
    image[4, 5:8, 2:18] += brightness
    return image.clip(0.01, 0.99).astype(np.float32)


@pytest.mark.parametrize("predict", ["center", "all"])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_only_tiles_in_which_something_stands_out_are_run(predict, batch):
    image, network = thread(), Identity(5, 20, predict)
    options = {"overlap": 0.25, "device": "cpu", "progress": False, "batch": batch}
    chance = predict_volume(network, image, **options)
    every = Identity(5, 20, predict)
    predict_volume(every, image, skip_empty=False, **options)
    assert 0 < network.tiles < every.tiles / 4
    # What is run is not diluted by the neighbours that are not, and the rest is empty.
    run = chance > 0
    np.testing.assert_allclose(chance[run], image[run], atol=1e-5)
    assert run[4, 5:8, 2:18].all()
    assert not run[:, 40:, 40:].any()
    slices = list(predict_slices(network, image, Tiling(0.25, batch, "cpu")))
    assert [first for first, _ in slices] == np.cumsum([0, *(len(s) for _, s in slices)])[
        :-1
    ].tolist()


def test_the_level_of_emptiness_is_a_percentile_that_bright_parts_do_not_raise_without_limit():
    heights = standing_out(thread())
    deviation = np.ptp(np.percentile(heights, [25, 75])) / 1.349
    assert empty_level(thread()) == pytest.approx(np.percentile(heights, 99.7), abs=1e-3)
    assert np.percentile(heights, 99.7) < 20 * deviation
    bright = thread(0, 0.1)
    bright[:, ::20, :20] = 0.99  # in more than one voxel of a hundred
    heights = standing_out(bright)
    deviation = np.ptp(np.percentile(heights, [25, 75])) / 1.349
    assert empty_level(bright) == pytest.approx(20 * deviation, rel=0.01)
    assert np.percentile(heights, 99.7) > 25 * deviation
    assert empty_level(np.full((3, 9, 9), 0.3, np.float32)) == 0
    # What lies far outside a mask does not count.
    masked = np.zeros((9, 300, 60), np.float32)
    masked[:, 100:160] = thread()
    assert empty_level(masked) > empty_level(thread())


def test_the_level_of_emptiness_of_a_sparse_volume_is_that_of_the_whole(monkeypatch):
    """Leaving out what is zero changes nothing; a margin too narrow would."""
    rng, levels = np.random.default_rng(4), {}
    sparse = np.zeros((12, 200, 220), np.float32)
    sparse[5:7, 70:110, 90:130] = rng.random((2, 40, 40))
    for reach in (volumes.REACH, 10_000, 8):
        monkeypatch.setattr(volumes, "REACH", reach)
        levels[reach] = empty_level(sparse)
    exact, whole, narrow = levels.values()
    assert exact == whole != narrow
    assert empty_level(np.zeros((3, 9, 9), np.float32)) == 0


def test_a_filter_counts_beside_the_network_by_its_weight():
    image, network = thread(), Identity(5, 20)
    plain = predict_volume(network, image, overlap=0, **QUIET)
    both = predict_volume(network, image, overlap=0, filter_weight=3.0, **QUIET)
    heights = np.concatenate(
        [
            np.concatenate([standing_out(image[:, y : y + 20, x : x + 20]) for x in (0, 20, 40)], 2)
            for y in (0, 20, 40)
        ],
        1,
    )
    odds = plain / (1 - plain) * np.exp(3 * (np.minimum(heights / empty_level(image), 2) - 1))
    np.testing.assert_allclose(both, odds / (1 + odds), atol=2e-4)
    assert both[4, 6, 10] > plain[4, 6, 10] + 0.05
    assert both[4, 40, 40] < plain[4, 40, 40] - 0.05
    # Where no tile is run, the filter alone finds nothing.
    skipped = predict_volume(network, image, device="cpu", progress=False, filter_weight=3.0)
    assert not skipped[:, 40:, 40:].any()


def test_calibration_chooses_the_weight_of_the_filter(tmp_path, monkeypatch):
    """Two volumes of other brightness: a threshold alone fits one of them, the filter both."""
    torch.manual_seed(0)
    network = Segmenter(NetworkSettings("test_vit", 3, block=48, size=48, width=32))
    checkpoint = tmp_path / "checkpoint.safetensors"
    facts = {"training": {"frozen": False}, "tau": 0.1}
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    images = [thread(), thread(0.12, 0.1)]
    masks = [np.zeros(images[0].shape, bool) for _ in images]
    for mask in masks:
        mask[4, 5:8, 2:18] = True
    samples = [
        SimpleNamespace(
            image=image, mask=mask, spacing=(1, 1, 1), pair=SimpleNamespace(name=f"cell{i}")
        )
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    monkeypatch.setattr(inference, "load_checkpoint", lambda path: (net, dict(facts)))
    net = Identity(5, 20)
    net.state_dict = network.state_dict
    saved = {}
    monkeypatch.setattr(inference, "save_checkpoint", lambda *given: saved.update(given[3]))
    plain = inference.calibrate(checkpoint, samples, fused=False, device="cpu")
    fused = inference.calibrate(checkpoint, samples, device="cpu")
    assert plain["filter_weight"] == 0
    assert fused["filter_weight"] > 0
    assert fused["calibrated"] > plain["calibrated"]
    assert set(saved["chosen_on"].values()) == {"cell0", "cell1"}
    assert saved.items() >= fused.items()
    saved.clear()
    with pytest.raises(DataError, match="hold out at least one"):
        inference.calibrate(checkpoint, [], device="cpu")
    with pytest.raises(TypeError):  # what is chosen holds for every slice, and for tiles as usual
        inference.calibrate(checkpoint, samples, every=2, skip_empty=False)
    assert not saved


@pytest.mark.filterwarnings("error")
def test_a_filter_that_finds_nothing_at_all_leaves_no_chance():
    assert fuse(np.float32([[0.5]]), np.float32([[-20]]), 8.0) == 0


@steady
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 40), st.integers(1, 40)),
    overlap=st.sampled_from([0, 0.25, 0.7]),
    depth=st.sampled_from([1, 3, 5]),
    predict=st.sampled_from(["center", "all"]),
    data=st.data(),
)
def test_a_box_is_that_part_of_the_whole(shape, overlap, depth, predict, data):
    class Slices(Identity):
        """Depends on the place in the tile, on all its slices, and on which slice is asked."""

        def forward(self, blocks):
            slices = torch.arange(depth if predict == "all" else 1).view(1, -1, 1, 1) / 5
            place = torch.arange(100.0).view(10, 10) / 25
            mean = blocks.mean((1, 2))[:, None]
            return 4 * mean - place + slices

    image, network = volume(shape), Slices(depth, 10, predict)
    how = {"skip_empty": data.draw(st.booleans()), "filter_weight": data.draw(st.floats(0, 4))}
    tiling = Tiling(overlap, data.draw(st.integers(1, 9)), "cpu", **how)
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    whole = predict_volume(network, image, progress=False, **asdict(tiling))
    found = predict_box(network, image, tuple(box), tiling, empty_level(image))
    np.testing.assert_allclose(found, whole[tuple(box)], atol=2e-6)


# Anonymous memory, without what is mapped from files: that the system takes back when it needs it.
BIG = """
import json, sys
import numpy as np, psutil, torch
from types import SimpleNamespace
from neurolib.inference import Tiling, predict_slices
from neurolib.volume import read_volume

process, peak = psutil.Process(), 0

def look():
    global peak
    used = process.memory_info()
    peak = max(peak, used.rss - used.shared)
    return used.rss - used.shared

class Cheap(torch.nn.Module):
    settings = SimpleNamespace(depth=1, block=100, predict="center")
    def forward(self, blocks):
        found = torch.logit(blocks[:, 0])
        look()
        return found

class Watched:
    # What is read is watched, and reading all at once is seen when it happens.
    def __init__(self, data):
        self.data, self.shape, self.ndim, self.dtype = data, data.shape, data.ndim, data.dtype
    def __getitem__(self, key):
        part = self.data[key]
        look()
        return part

torch.set_num_threads(1)
image = read_volume(sys.argv[1], check=False).data
network = Cheap()
tiling = Tiling(0, 4, "cpu", skip_empty=False)
list(predict_slices(network, np.full((3, 120, 120), 0.5, np.float32), tiling))
before = look()
out = np.lib.format.open_memmap(sys.argv[2], "w+", np.float32, image.shape)
for z, slices in predict_slices(network, Watched(image), tiling):
    out[z : z + len(slices)] = slices
wrong = max(float(np.abs(a - b).max()) for a, b in zip(out, image, strict=True))
print(json.dumps({"grown": peak - before, "wrong": wrong}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how much of the memory is mapped is not told")
def test_a_volume_ten_times_larger_than_the_memory_allowed_is_predicted(tmp_path):
    allowed = 10 << 20
    path, out = tmp_path / "big.npy", tmp_path / "out.npy"
    shape = 165, 400, 400
    image = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    assert image.nbytes > 10 * allowed
    ramp = np.linspace(0.1, 0.8, 400, dtype=np.float32)
    for z in range(len(image)):
        image[z] = ramp + z / 1000
    del image
    done = subprocess.run(
        [sys.executable, "-c", BIG, path, out], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    out.unlink(), path.unlink()
    assert found["wrong"] < 1e-5
    assert found["grown"] < allowed


def test_image_of_any_layout_and_float_type_is_read_and_left_as_it_is():
    image = volume((6, 12, 14))
    expected = predict_volume(Identity(), image, **QUIET)
    for view in (np.asfortranarray(image), image.astype(np.float64)):
        view.setflags(write=False)
        found = predict_volume(Identity(), view, **QUIET)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("predict", ["center", "all"])
def test_memory_grows_with_the_slice_and_not_with_the_number_of_slices(predict):
    peaks = []
    for slices in (20, 200):
        image = volume((slices, 60, 60))
        network = Identity(5, 30, predict)
        tracemalloc.start()
        for _ in predict_slices(network, image, Tiling(0.5, 4, "cpu", skip_empty=False)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The volume of 200 slices is 2.9 MB; the list of its places, 24 bytes each, may grow.
    places = 200 * 9 * 24 * 4
    assert peaks[1] < peaks[0] + places + 100_000
    assert peaks[1] < 200 * 60 * 60 * 4 / 2


@pytest.mark.parametrize("predict", ["center", "all"])
@pytest.mark.parametrize("depth", [1, 3])
def test_real_network_covers_a_volume_smaller_than_a_block(predict, depth):
    torch.manual_seed(0)
    network = Segmenter(
        NetworkSettings("test_vit", depth, block=48, size=48, predict=predict, width=32)
    )
    found = predict_volume(network, volume((2, 30, 60)), **QUIET)
    assert found.shape == (2, 30, 60)
    assert ((found > 0) & (found < 1)).all()
    assert not network.training


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((5, 5)), r"\(5, 5\)"),
        (np.zeros((0, 5, 5)), r"\(0, 5, 5\)"),
        (np.zeros((1, 5, 5, 3)), "expected a volume"),
        (np.full((3, 5, 5), 255.0), "255"),
        (np.full((3, 5, 5), -0.1), "-0.1"),
        (np.full((3, 5, 5), np.nan), "nan"),
    ],
)
def test_unusable_image_is_refused_in_one_line(image, part):
    with pytest.raises(VolumeError, match=part) as error:
        predict_volume(Identity(), image, **QUIET)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"overlap": -0.1},
        {"overlap": 0.95},
        {"batch": 0},
        {"device": "abacus"},
        {"filter_weight": -1},
    ],
    ids=str,
)
def test_unusable_settings_are_refused_in_one_line(bad):
    options = {"device": "cpu"} | bad
    with pytest.raises(SettingsError, match=next(iter(bad))) as error:
        predict_volume(Identity(), volume((2, 5, 5)), progress=False, **options)
    assert "\n" not in str(error.value)


def test_prediction_of_a_checkpoint_is_made_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = Segmenter(NetworkSettings("test_vit", 3, block=48, size=48, width=32))
    facts = {"training": {"frozen": False}, "tau": 0.1}
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    image = volume((3, 40, 50))
    options = QUIET | {"overlap": 0.25}
    first = predicted(tmp_path / "out", "cell", checkpoint, image, **options)
    named = options | {"every": 1, "flips": False}
    np.testing.assert_array_equal(
        predicted(tmp_path / "out", "cell", checkpoint, image, **named), first
    )
    assert len(list((tmp_path / "out").iterdir())) == 1
    np.testing.assert_allclose(
        first, predict_volume(network.eval(), image, **options), rtol=0, atol=1e-6
    )
    monkeypatch.setattr(inference, "predict_volume", None)
    again = predicted(tmp_path / "out", "cell", checkpoint, image, **options)
    np.testing.assert_array_equal(first, again)
    # Another image of that name, other weights, overlap, precision or code are another prediction:
    # it would have to be made.
    with pytest.raises(TypeError):
        predicted(tmp_path / "out", "cell", checkpoint, image[:, ::-1], **options)
    others = {"pick_precision": lambda *_: "another", "CODE": inference.CODE[:-1]}
    for changed, value in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(inference, changed, value)
            with pytest.raises(TypeError):
                predicted(tmp_path / "out", "cell", checkpoint, image, **options)
    with pytest.raises(TypeError):
        predicted(tmp_path / "out", "cell", checkpoint, image, **(options | {"overlap": 0.5}))
    with torch.no_grad():
        network.head[1].bias.add_(1)
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    with pytest.raises(TypeError):
        predicted(tmp_path / "out", "cell", checkpoint, image, **options)
    checkpoint.write_bytes(b"junk")
    with pytest.raises(WeightsError):
        predicted(tmp_path / "out", "cell", checkpoint, image, **options)


def test_a_prediction_has_its_own_weight_or_that_of_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    network = Segmenter(NetworkSettings("test_vit", 3, block=48, size=48, width=32))
    checkpoint, image = tmp_path / "checkpoint.safetensors", volume((3, 40, 50))
    facts = {"training": {"frozen": False}, "tau": 0.1, "filter_weight": 4.0}
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    for own, weight in (({}, 4.0), ({"filter_weight": 0.0}, 0.0), ({"filter_weight": 2.0}, 2.0)):
        found = predicted(tmp_path / "out", "cell", checkpoint, image, **QUIET, **own)
        wanted = predict_volume(network, image, filter_weight=weight, **QUIET)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    for _ in range(2):
        one = predicted(tmp_path / "out", "cell", checkpoint, image, every=3, **QUIET)
        assert one.shape == (1, 40, 50)


def test_a_tree_is_made_of_all_slices_with_the_weight_that_is_given(monkeypatch):
    facts, seen = {"threshold": 0.5, "min_size": 1, "filter_weight": 4.0}, []
    monkeypatch.setattr(segmentation, "load_checkpoint", lambda path: (Identity(), facts))

    def predict(network, image, *, filter_weight, **_):
        seen.append(filter_weight)
        return image

    monkeypatch.setattr(segmentation, "predict_volume", predict)
    for own in ({}, {"filter_weight": 0.0}):
        segmentation.segment(thread(), device="cpu", **own)
    assert seen == [4, 0]
    with pytest.raises(SettingsError, match="every=3: expected 1"):
        segmentation.segment(thread(), every=3)


def test_auto_declines_an_apple_gpu_in_one_line(monkeypatch, capsys):
    """One rule for inference and training; nothing of either needs float64 on a device."""
    from neurolib import devices, training

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    devices._say_once.cache_clear()
    assert pick_device("auto") == torch.device("cpu")
    assert training.start_fabric("auto").device == torch.device("cpu")
    assert capsys.readouterr().err.count("Apple GPU") == 1
