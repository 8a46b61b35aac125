"""The segmentation network: shapes, alignment, initialisation and what its settings refuse."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from neurolib._timm import timm
from neurolib.errors import SettingsError, WeightsError
from neurolib.network import (
    NetworkSettings,
    PyramidDecoder,
    Segmenter,
    build,
    settings_of,
    token_colours,
)

# timm's own test model: 6 layers of 64 channels.
TINY = "test_vit"
SMALL = NetworkSettings(encoder=TINY, size=112, width=32)


def network_of(**settings):
    torch.manual_seed(0)
    return Segmenter(dataclasses.replace(SMALL, **settings)).eval()


def run(network, *shape):
    with torch.inference_mode():
        return network(torch.rand(*shape, generator=torch.Generator().manual_seed(1)))


# ------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("size", "depth", "predict", "stem"),
    [
        (112, 1, "center", False),
        (112, 1, "all", True),
        (112, 5, "all", True),
        (112, 3, "center", True),
        (224, 1, "center", True),
        (224, 3, "all", False),
        (224, 5, "center", False),
    ],
)
def test_logits_have_the_shape_of_the_block(size, depth, predict, stem):
    network = network_of(size=size, depth=depth, predict=predict, stem=stem)
    logits = run(network, 2, 1, depth, 100, 100)
    assert logits.shape == (2, depth if predict == "all" else 1, 100, 100)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("size", [112, 224])
@pytest.mark.parametrize("tile", [(100, 100), (64, 150), (97, 131), (200, 200)])
def test_tiles_of_any_size_keep_the_scale_of_the_block(size, tile):
    network = network_of(size=size)
    seen = network.resize(torch.rand(1, 5, *tile))
    for found, side in zip(seen.shape[-2:], tile, strict=True):
        assert found % 16 == 0
        # To the nearest multiple of the patch, or padded up to it.
        low, high = (side * 2.24 - 8, side * 2.24 + 8) if size == 224 else (side, side + 15)
        assert low <= found <= high
    rows = [side // 16 for side in seen.shape[-2:]]
    assert [list(t.shape[-2:]) for t in network.encode(torch.rand(1, 5, *tile))] == [rows] * 4
    assert run(network, 1, 1, 5, *tile).shape == (1, 1, *tile)


def test_dinov2_patches_of_14_fit_too():
    network = network_of(encoder="vit_small_patch14_dinov2", size=112)
    assert network.resize(torch.rand(1, 5, 100, 100)).shape[-2:] == (112, 112)
    assert run(network, 1, 1, 5, 100, 100).shape == (1, 1, 100, 100)


def test_network_of_a_smaller_size_than_the_block_shrinks_the_block():
    network = network_of(block=128, size=64)
    assert network.resize(torch.rand(1, 5, 128, 128)).shape[-2:] == (64, 64)
    assert run(network, 1, 1, 5, 128, 128).shape == (1, 1, 128, 128)


@pytest.mark.parametrize("depth", [1, 5])
def test_parameters_of_2d_and_3d_differ_in_the_patch_embedding_only(depth):
    count = {
        d: sum(p.numel() for p in network_of(depth=d).parameters()) for d in (depth, depth + 2)
    }
    assert count[depth + 2] - count[depth] == 2 * 64 * 16 * 16


# ---------------------------------------------------------------------------- alignment


class Seen(nn.Module):
    """In place of the decoder: the image as the encoder sees it, at the decoder's resolution."""

    def forward(self, image):
        return F.avg_pool2d(image, 2)


@pytest.mark.parametrize("size", [112, 224])
@pytest.mark.parametrize("tile", [(100, 100), (90, 120)])
def test_every_voxel_of_the_output_lies_where_it_lies_in_the_input(size, tile):
    """A network whose encoder and decoder only resample must return its input, not shifted."""
    network = network_of(size=size)
    network.encode = network.resize
    network.decoder, network.head = Seen(), nn.Identity()
    y, x = np.meshgrid(*(np.arange(n) for n in tile), indexing="ij")
    wave = (np.sin(y / 9) + np.cos(x / 7)).astype(np.float32)
    with torch.inference_mode():
        found = network(torch.from_numpy(wave)[None, None, None].expand(1, 1, 5, -1, -1))
    assert found.shape == (1, 5, *tile)
    inside = (slice(2, -2), slice(2, -2))
    error = np.abs(found[0, 0].numpy() - wave)[inside]
    # A shift of one voxel alone would give 1/7.
    assert error.max() < 0.04


def test_output_depends_on_the_pixel_below_it_through_the_stem():
    network = network_of(stem=True, size=112)
    block = torch.rand(1, 1, 5, 100, 100)
    network.encode = lambda slices: [torch.zeros(1, 64, 7, 7)] * 4
    with torch.no_grad():
        network.head[-1].bias.zero_()
        before = network(block)
        block[0, 0, 2, 40, 70] += 5
        change = (network(block) - before).abs()[0, 0].numpy()
    assert np.unravel_index(change.argmax(), change.shape) == pytest.approx((40, 70), abs=3)
    # GroupNorm sees the whole tile, so that a trace of the change is everywhere.
    assert change[37:44, 67:74].mean() > 20 * np.median(change)


def test_logits_start_where_neurites_are_rare():
    logits = run(network_of(), 4, 1, 5, 100, 100)
    assert logits.sigmoid().mean() < 0.1


# ----------------------------------------------------------------------- initialisation


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """2D weights in timm's layout, written to a file as a user would have them."""
    torch.manual_seed(9)
    model = timm.create_model(TINY, pretrained=False, num_classes=0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


INITIALISATIONS = ("scratch", "average", "center", "gaussian", "random")


def test_one_seed_gives_one_decoder_under_every_initialisation(weights_file):
    settings = dataclasses.replace(SMALL, stem=True)
    built = {i: build(settings, i, weights_file, seed=3)[0] for i in INITIALISATIONS}
    ours = {
        name: {k: v for k, v in net.state_dict().items() if not k.startswith("encoder.")}
        for name, net in built.items()
    }
    assert len(ours["scratch"]) > 20
    for name in INITIALISATIONS:
        assert all(torch.equal(ours[name][k], v) for k, v in ours["scratch"].items())
    kernels = [net.encoder.patch_embed.proj.weight.detach() for net in built.values()]
    for i, one in enumerate(kernels):
        assert not any(torch.allclose(one, other) for other in kernels[:i])
    other = build(settings, "scratch", seed=4)[0].state_dict()
    assert not torch.equal(other["head.1.weight"], ours["scratch"]["head.1.weight"])


def test_build_is_the_same_twice_and_reports_what_was_loaded(weights_file):
    (a, report), (b, _) = (build(SMALL, "random", weights_file, seed=5) for _ in range(2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert report.share == 1
    assert build(SMALL, "scratch", seed=5)[1] is None


def test_unknown_initialisation_and_missing_file_are_refused(weights_file, tmp_path):
    with pytest.raises(SettingsError, match="strategy"):
        build(SMALL, "centre", weights_file)
    with pytest.raises(WeightsError, match="no such weights file"):
        build(SMALL, "center", str(tmp_path / "missing.pth"))


def test_settings_survive_as_plain_values():
    settings = dataclasses.replace(SMALL, depth=3, predict="all", stem=True)
    assert NetworkSettings(**settings_of(Segmenter(settings))) == settings


@pytest.mark.parametrize(
    "bad",
    [
        {"predict": "centre"},
        {"depth": 4},
        {"depth": 0},
        {"block": 0},
        {"size": 0},
        {"width": 20},
        {"width": 0},
        {"encoder": "vit_nosuch"},
        {"encoder": "vit_small_patch16_224.nonsense"},
    ],
    ids=str,
)
def test_unusable_settings_are_refused_in_one_line(bad):
    with pytest.raises(SettingsError) as error:
        dataclasses.replace(SMALL, **bad)
    assert "\n" not in str(error.value)
    assert str(next(iter(bad.values()))) in str(error.value)


def test_encoder_that_is_no_vision_transformer_is_refused():
    with pytest.raises(SettingsError, match="resnet18"):
        Segmenter(dataclasses.replace(SMALL, encoder="resnet18"))


# ------------------------------------------------------------------------------- decoder


def test_decoder_uses_every_one_of_its_four_layers():
    torch.manual_seed(0)
    decoder = PyramidDecoder(16, 32)
    layers = [torch.randn(1, 16, 7, 7, requires_grad=True) for _ in range(4)]
    out = decoder(layers)
    assert out.shape == (1, 16, 56, 56)
    out.square().sum().backward()
    assert all(layer.grad.abs().sum() > 0 for layer in layers)


def test_encoder_is_tapped_at_four_even_depths_the_last_included():
    assert network_of().taps == [0, 2, 3, 5]
    assert network_of(encoder="vit_tiny_patch16_224").taps == [2, 5, 8, 11]


def test_token_colours_are_an_image_of_the_three_main_components():
    network = network_of(size=112)
    tokens = torch.zeros(1, 64, 6, 8)
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    tokens[0, 3], tokens[0, 40], tokens[0, 7] = 4 * x, 2 * y, ((x + y) % 2) / 2
    network.encode = lambda slices: [tokens]
    image = token_colours(network, torch.zeros(1, 5, 100, 100))
    assert image.shape == (6, 8, 3)
    np.testing.assert_allclose(image[..., 0], x / 7, atol=1e-6)
    np.testing.assert_allclose(image[..., 1], y / 5, atol=1e-6)
    assert image.min() == 0
    assert image.max() == 1
