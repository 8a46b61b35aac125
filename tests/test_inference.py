"""Stacked segmentation: a network that changes nothing must give the volume back."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurolib import inference
from neurolib.errors import SettingsError, VolumeError, WeightsError
from neurolib.inference import pick_device, predict_slices, predict_volume, predicted
from neurolib.network import NetworkSettings, Segmenter
from neurolib.training import TrainingSettings, save_checkpoint

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
    found = predict_volume(network, image, overlap, batch, "cpu", progress=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, image, atol=1e-5)


@pytest.mark.parametrize(("depth", "every"), [(10, 3), (9, 2), (7, 1), (3, 5)])
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_a_sample_of_slices_is_that_of_the_whole(depth, every, batch):
    class Neighbours(Identity):
        def forward(self, blocks):
            return blocks[:, 0].mean(1, keepdim=True)

    image = volume((depth, 14, 11))
    options = {"overlap": 0.5, "device": "cpu", "progress": False}
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
    pieces = list(predict_slices(Identity(5, 10, predict), image, 0.5, 3, "cpu", progress=False))
    assert [first for first, _ in pieces] == [
        sum(len(p) for _, p in pieces[:i]) for i in range(len(pieces))
    ]
    assert len(pieces) > 5
    np.testing.assert_allclose(np.concatenate([p for _, p in pieces]), image, atol=1e-5)


def test_every_slice_gets_the_votes_of_all_blocks_that_contain_it():
    """13 slices, blocks of five every three slices: centres at 0, 3, 6, 9, 12."""
    found = predict_volume(
        Voter(5, 10, "all"), volume((13, 10, 10)), 0, device="cpu", progress=False
    )
    centres = np.array([0, 3, 6, 9, 12])
    for z in range(13):
        votes = [(z - c + 3) / 10 for c in centres if abs(z - c) <= 2]
        np.testing.assert_allclose(found[z], np.mean(votes), rtol=1e-5)


def test_a_voxel_far_from_the_middle_of_a_tile_counts_less_than_one_in_it():
    """Two tiles overlap; one says 0.2, the other 0.8: the nearer one wins."""

    class Sides(Identity):
        def forward(self, blocks):
            left = blocks[:, 0, 2, :, :1].mean((1, 2)) < 0.5
            votes = torch.where(left, 0.2, 0.8)
            return torch.logit(votes).view(-1, 1, 1, 1).expand(-1, 1, 10, 10)

    image = np.full((1, 10, 15), 0.3, np.float32)
    image[..., 5:] = 0.7
    found = predict_volume(Sides(), image, 0.5, device="cpu", progress=False)[0]
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
    found = predict_volume(network, image, 0, batch=4, device="cpu", progress=False)
    # Blocks of 3 slices see the signal from centres 2 to 6, in one of nine places; 81 in all.
    assert network.tiles == 5
    np.testing.assert_allclose(found, image, atol=1e-5)
    assert (found[image == 0] == 0).all()
    empty = predict_volume(network, np.zeros_like(image), device="cpu", progress=False)
    assert not empty.any()
    assert network.tiles == 5


def test_result_is_written_to_a_memory_map(tmp_path):
    image = volume((6, 12, 14))
    out = np.lib.format.open_memmap(tmp_path / "p.npy", "w+", np.float32, image.shape)
    assert predict_volume(Identity(), image, device="cpu", progress=False, out=out) is out
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), image, atol=1e-5)


def test_image_of_any_layout_and_float_type_is_read_and_left_as_it_is():
    image = volume((6, 12, 14))
    expected = predict_volume(Identity(), image, device="cpu", progress=False)
    for view in (np.asfortranarray(image), image.astype(np.float64)):
        view.setflags(write=False)
        found = predict_volume(Identity(), view, device="cpu", progress=False)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("predict", ["center", "all"])
def test_memory_grows_with_the_slice_and_not_with_the_number_of_slices(predict):
    peaks = []
    for slices in (20, 200):
        image = volume((slices, 60, 60))
        network = Identity(5, 30, predict)
        tracemalloc.start()
        for _ in predict_slices(network, image, 0.5, 4, "cpu", progress=False):
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
    found = predict_volume(network, volume((2, 30, 60)), 0.25, device="cpu", progress=False)
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
        predict_volume(Identity(), image, device="cpu", progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", [{"overlap": -0.1}, {"overlap": 0.95}, {"batch": 0}, {"device": "abacus"}], ids=str
)
def test_unusable_settings_are_refused_in_one_line(bad):
    options = {"device": "cpu"} | bad
    with pytest.raises(SettingsError, match=next(iter(bad))) as error:
        predict_volume(Identity(), volume((2, 5, 5)), progress=False, **options)
    assert "\n" not in str(error.value)


def test_device_is_found_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(SettingsError, match="cuda:99"):
        pick_device("cuda:99")


def test_prediction_of_a_checkpoint_is_made_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = Segmenter(NetworkSettings("test_vit", 3, block=48, size=48, width=32))
    facts = {"training": TrainingSettings().__dict__, "tau": 0.1}
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    image = volume((3, 40, 50))
    options = {"overlap": 0.25, "device": "cpu", "progress": False}
    first = predicted(tmp_path / "out", "cell", checkpoint, image, **options)
    np.testing.assert_allclose(
        first, predict_volume(network.eval(), image, **options), rtol=0, atol=1e-6
    )
    monkeypatch.setattr(inference, "predict_volume", None)
    again = predicted(tmp_path / "out", "cell", checkpoint, image, **options)
    np.testing.assert_array_equal(first, again)
    # Other weights or another overlap are another prediction: it would have to be made.
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
