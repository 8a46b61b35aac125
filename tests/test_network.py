"""The segmentation network: shapes, alignment, initialisation and bad settings."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from neurolib import network as rooms
from neurolib._timm import timm
from neurolib.errors import NeurolibWarning, SettingsError, WeightsError
from neurolib.network import (
    ENCODERS,
    NetworkSettings,
    PyramidDecoder,
    Segmenter,
    attention,
    build,
    class_attention,
    cost,
    costs,
    describe_encoders,
    local_contrast,
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


@pytest.mark.parametrize(
    "encoder", ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch16_224.dino"]
)
def test_from_scratch_every_block_of_the_encoder_counts(encoder):
    """Also where the initial layer scale, 1e-5 in some architectures, would hide them."""
    network, _ = build(NetworkSettings(encoder=encoder, size=112), "scratch")
    tokens = []
    for block in network.encoder.blocks:
        block.register_forward_hook(lambda _, given, out: tokens.append((given[0], out)))
    run(network.eval(), 1, 1, 5, 100, 100)
    assert len(tokens) == 12
    assert all((out - given).norm() > 0.02 * given.norm() for given, out in tokens)


# ------------------------------------------------------------------------------- shapes


KINDS = [(112, 1, "center", False), (112, 1, "all", True), (112, 5, "all", True)]
KINDS += [(112, 3, "center", True), (224, 1, "center", True), (224, 3, "all", False)]
KINDS += [(224, 5, "center", False)]


@pytest.mark.parametrize(("size", "depth", "predict", "stem"), KINDS)
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
    for shown, side in zip(seen.shape[-2:], tile, strict=True):
        assert shown % 16 == 0
        # To the nearest multiple of the patch, or padded up to it.
        low, high = (side * 2.24 - 8, side * 2.24 + 8) if size == 224 else (side, side + 15)
        assert low <= shown <= high
    rows = [side // 16 for side in seen.shape[-2:]]
    assert [list(t.shape[-2:]) for t in network.encode(torch.rand(1, 5, *tile))] == [rows] * 4
    assert run(network, 1, 1, 5, *tile).shape == (1, 1, *tile)


@pytest.mark.parametrize(
    ("settings", "side"),
    [({"encoder": "vit_small_patch14_dinov2", "size": 112}, 112), ({"block": 128, "size": 64}, 64)],
    ids=["patches of 14 pixels", "blocks that are shrunk"],
)
def test_other_patches_and_sizes_fit_too(settings, side):
    network = network_of(**settings)
    block = network.settings.block
    assert network.resize(torch.rand(1, 5, block, block)).shape[-2:] == (side, side)
    assert run(network, 1, 1, 5, block, block).shape == (1, 1, block, block)


# ---------------------------------------------------------------------------- alignment


class Seen(nn.Module):
    """Replaces the decoder: the encoder's image at the decoder's resolution."""

    def forward(self, image):
        return F.avg_pool2d(image, 2)


@pytest.mark.parametrize("size", [112, 224])
@pytest.mark.parametrize("tile", [(100, 100), (90, 120)])
def test_every_voxel_of_the_output_lies_where_it_lies_in_the_input(size, tile):
    """A network whose encoder and decoder only resample must return its input, not shifted."""
    network = network_of(size=size)
    network._tokens = network.resize
    network.decoder, network.head = Seen(), nn.Identity()
    y, x = np.meshgrid(*(np.arange(n) for n in tile), indexing="ij")
    wave = (np.sin(y / 9) + np.cos(x / 7)).astype(np.float32)
    with torch.inference_mode():
        output = network(torch.from_numpy(wave)[None, None, None].expand(1, 1, 5, -1, -1))
    assert output.shape == (1, 5, *tile)
    inside = (slice(2, -2), slice(2, -2))
    error = np.abs(output[0, 0].numpy() - wave)[inside]
    # A shift of one voxel alone would give 1/7.
    assert error.max() < 0.04


def test_output_depends_on_the_pixel_below_it_through_the_stem():
    network = network_of(stem=True, size=112)
    block = torch.rand(1, 1, 5, 100, 100)
    network._tokens = lambda shown: [torch.zeros(1, 64, 7, 7)] * 4
    with torch.no_grad():
        network.head[-1].bias.zero_()
        before = network(block)
        block[0, 0, 2, 40, 70] += 5
        change = (network(block) - before).abs()[0, 0].numpy()
    assert np.unravel_index(change.argmax(), change.shape) == pytest.approx((40, 70), abs=8)
    # GroupNorm sees the whole tile, so that a trace of the change is everywhere.
    assert change[37:44, 67:74].mean() > 5 * np.median(change)


@pytest.mark.parametrize("shape", [(100, 100), (48, 61), (7, 5), (200, 130)])
def test_local_contrast_forgets_exposure_and_background(shape):
    slices = torch.rand(2, 5, *shape, generator=torch.Generator().manual_seed(0))
    contrast = local_contrast(slices)
    assert contrast.shape == slices.shape
    assert 0 <= contrast.min() <= contrast.max() <= 1
    # Up to the constant that keeps an empty block from being divided by zero.
    torch.testing.assert_close(local_contrast(0.5 * slices + 0.3), contrast, rtol=0, atol=2e-3)
    empty = local_contrast(torch.zeros_like(slices))
    torch.testing.assert_close(empty, torch.full_like(slices, 1.5 / 9.5))


def test_local_contrast_of_a_thread_is_the_same_on_dark_and_bright_ground():
    image = torch.normal(0.2, 0.01, (1, 5, 100, 100), generator=torch.Generator().manual_seed(0))
    image[..., 50:] += 0.5
    image[..., 49:51, :] += 0.1
    contrast = local_contrast(image)[0, :, 49:51]
    dark, bright = contrast[..., :30].mean(), contrast[..., 70:].mean()
    assert abs(dark - bright) < 0.1 * dark
    assert dark > 1.5 * local_contrast(image)[0, :, 20, :30].mean()


def test_logits_start_where_neurites_are_rare():
    logits = run(network_of(), 4, 1, 5, 100, 100)
    assert logits.sigmoid().mean() < 0.1


# ----------------------------------------------------------------------- initialisation


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """2D weights in timm's layout, in a user's file."""
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


def test_a_file_of_unnamed_pre_training_is_normalised_with_a_warning(weights_file):
    with pytest.warns(NeurolibWarning, match="name the variant, as in vit_small_patch16"):
        build(SMALL, "center", weights_file)


def test_unknown_initialisation_and_missing_file_are_refused(weights_file, tmp_path):
    with pytest.raises(SettingsError, match="strategy"):
        build(SMALL, "centre", weights_file)
    with pytest.raises(WeightsError, match="no such weights file"):
        build(SMALL, "center", str(tmp_path / "missing.pth"))


BAD = [("predict", "centre"), ("depth", 4), ("depth", 0), ("block", 0), ("size", 0)]
BAD += [("width", 20), ("width", 0), ("encoder", "vit_nosuch")]
BAD += [("encoder", "vit_small_patch16_224.nonsense")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_unusable_settings_are_refused_in_one_line(name, value):
    with pytest.raises(SettingsError) as error:
        dataclasses.replace(SMALL, **{name: value})
    assert "\n" not in str(error.value)
    assert str(value) in str(error.value)


OTHERS = ["resnet18", "convnext_tiny", "swin_tiny_patch4_window7_224", "samvit_base_patch16"]


@pytest.mark.parametrize("name", [*OTHERS, "vit_base_r50_s16_224", "vit_base_mci_224"])
def test_encoder_that_is_no_plain_vision_transformer_is_refused(name):
    with pytest.raises(SettingsError, match=f"{name}.*not a plain") as error, torch.device("meta"):
        Segmenter(dataclasses.replace(SMALL, encoder=name, size=224))
    assert "\n" not in str(error.value)


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
    network._tokens = lambda slices: [tokens]
    image = token_colours({"one": network}, torch.zeros(1, 5, 100, 100))["one"]
    assert image.shape == (6, 8, 3)
    np.testing.assert_allclose(image[..., 0], x / 7, atol=1e-6)
    np.testing.assert_allclose(image[..., 1], y / 5, atol=1e-6)
    assert image.min() == 0
    assert image.max() == 1


def test_token_colours_of_several_networks_share_their_components():
    networks = {name: network_of(size=112) for name in ("left to right", "right to left")}
    ramp = torch.zeros(1, 64, 6, 8)
    ramp[0, 3] = torch.arange(8.0)
    for network, tokens in zip(networks.values(), (ramp, -3 * ramp), strict=True):
        network._tokens = lambda slices, tokens=tokens: [tokens]
    first, second = token_colours(networks, torch.zeros(1, 5, 100, 100)).values()
    np.testing.assert_allclose(first[..., 0], 1 - second[..., 0], atol=1e-6)


# ------------------------------------------------------------------------------ attention


def fused_pieces(network, slices):
    """Of the last block as it always runs: the values v (B, heads, N, d), and what they become."""
    layer = network.encoder.blocks[-1].attn
    assert layer.fused_attn
    kept = {}
    hooks = [
        layer.qkv.register_forward_hook(lambda _, inputs, output: kept.update(qkv=output)),
        layer.proj.register_forward_pre_hook(lambda _, inputs: kept.update(mixed=inputs[0])),
    ]
    with torch.inference_mode():
        network.encode(slices)
    for hook in hooks:
        hook.remove()
    batch, count, _ = kept["qkv"].shape
    parts = kept["qkv"].reshape(batch, count, 3, layer.num_heads, -1)
    return parts[:, :, 2].transpose(1, 2), kept["mixed"]


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"],
    ids=["plain", "registers", "rotary"],
)
def test_attention_mixes_the_values_as_timms_fused_kernel_does(name):
    network = network_of(encoder=name, size=112)
    slices = torch.rand(2, 5, 100, 80, generator=torch.Generator().manual_seed(1))
    weights = attention(network, slices)
    layer = network.encoder.blocks[-1].attn
    rows, columns = (side // network.patch for side in network.resize(slices).shape[-2:])
    count = network.encoder.num_prefix_tokens + rows * columns
    assert weights.shape == (2, layer.num_heads, count, count)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    values, mixed = fused_pieces(network, slices)
    changed = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(changed, mixed, rtol=1e-4, atol=1e-6)


def test_the_network_is_left_as_it_was_even_if_looking_at_it_fails():
    network = network_of()
    layer = network.encoder.blocks[-1].attn
    attention(network, torch.rand(1, 5, 100, 100))
    with pytest.raises(RuntimeError):
        attention(network, torch.rand(1, 4, 100, 100))
    assert layer.fused_attn
    assert not layer.attn_drop._forward_hooks
    network.encoder.blocks[-1].attn = nn.Identity()
    with pytest.raises(SettingsError, match="hides its attention"):
        attention(network, torch.rand(1, 5, 100, 100))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5)],
)
def test_map_of_the_class_token_has_each_patch_at_its_place(name, prefix, monkeypatch):
    network = network_of(encoder=name, size=112)
    slices = torch.zeros(1, 5, 100, 60)
    rows, columns = (side // network.patch for side in network.resize(slices).shape[-2:])
    assert rows != columns
    count = prefix + rows * columns
    known = torch.zeros(1, 3, count, count)
    known[0, 2, 0] = torch.arange(count)
    monkeypatch.setattr(rooms, "attention", lambda *_: known)
    maps = class_attention(network, slices)
    assert maps.shape == (3, rows, columns)
    assert not maps[:2].any()
    for r, c in ((0, 0), (0, columns - 1), (2, 1), (rows - 1, columns - 1)):
        assert maps[2, r, c] == prefix + r * columns + c


def test_encoder_without_class_token_shows_what_its_patches_look_at():
    network = network_of(encoder="vit_base_patch16_siglip_224", size=112)
    slices = torch.rand(1, 5, 100, 100, generator=torch.Generator().manual_seed(1))
    maps = class_attention(network, slices)
    assert maps.shape == (12, 7, 7)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(maps.ravel(), attention(network, slices)[0].mean(1).ravel())


# ----------------------------------------------------------------------------------- cost


PLAIN = NetworkSettings(encoder="vit_tiny_patch16_224", width=32)  # 12 layers of 192 channels


@pytest.mark.parametrize("depth", [1, 3, 5, 7, 9])
def test_cost_is_that_of_the_closed_formulas(depth):
    """Two operations per product; N tokens of width E, 196 of them patches of 16 x 16."""
    counted = cost(dataclasses.replace(PLAIN, depth=depth))
    e, n = 192, 197
    embedding = 2 * e * depth * 16**2 * 196
    assert counted["patch embedding"] == (e * depth * 16**2 + e, embedding)
    # qkv, projection and the two layers of the MLP are 12 E² weights; q kᵀ and its product with v.
    blocks = 12 * (2 * 12 * n * e**2 + 2 * 2 * n**2 * e)
    assert counted["encoder"][1] == embedding + blocks
    network = Segmenter(dataclasses.replace(PLAIN, depth=depth))
    assert counted["network"][0] == sum(p.numel() for p in network.parameters())


def test_nothing_but_the_patch_embedding_costs_more_in_3d():
    settings = dataclasses.replace(PLAIN, encoder="vit_small_patch14_dinov2.lvd142m")
    by_depth = {depth: cost(dataclasses.replace(settings, depth=depth)) for depth in (1, 3, 9)}
    for part in ("encoder", "network"):
        rests = {
            tuple(whole - own for whole, own in zip(c[part], c["patch embedding"], strict=True))
            for c in by_depth.values()
        }
        assert len(rests) == 1
    for i in (0, 1):
        assert by_depth[9]["network"][i] > by_depth[3]["network"][i] > by_depth[1]["network"][i]


def test_costs_are_rows_that_compare_with_the_first_depth():
    rows = costs(PLAIN)
    flops = [cost(dataclasses.replace(PLAIN, depth=d))["network"][1] for d in (1, 3, 5, 7, 9)]
    assert [row["slices"] for row in rows] == [1, 3, 5, 7, 9]
    assert [row["network, GFLOPs"] * 1e9 for row in rows] == pytest.approx(flops)
    ratios = [row["GFLOPs over depth 1"] for row in rows]
    assert ratios == [f"{found / flops[0] - 1:+.1%}" for found in flops]


# ------------------------------------------------------------------- the table of encoders


def test_table_has_every_encoder_with_the_size_its_authors_name():
    rows = {row["encoder"]: row for row in describe_encoders()}
    assert tuple(rows) == ENCODERS
    for name, row in rows.items():
        assert f"_patch{row['patch']}_" in name
        # Millions of parameters in the papers: 21 to 22 of a ViT-S, 85 to 87 of a ViT-B.
        width, low, high = (384, 21, 22.5) if "_small_" in name else (768, 85, 87)
        assert row["width"] == width
        assert low <= float(row["M parameters"]) <= high
        assert row["layers"] == 12
        assert row["source"].startswith("[hub](https://huggingface.co/timm/vit_")
    licences = {name: row["licence"] for name, row in rows.items()}
    assert licences["vit_small_patch16_224.dino"] == "apache-2.0"
    assert licences["vit_base_patch16_224.mae"] == "cc-by-nc-4.0"
    assert licences["vit_base_patch16_dinov3.lvd1689m"] == "dinov3-license"
    assert rows["vit_base_patch14_dinov2.lvd142m"]["image"] == 518


def test_table_says_where_timm_states_no_licence_and_leaves_out_what_timm_has_not(monkeypatch):
    config = dataclasses.replace(timm.get_pretrained_cfg(TINY), license=None)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config)
    monkeypatch.setattr(rooms, "ENCODERS", (TINY, "vit_nosuch_patch16_224.dino"))
    (row,) = describe_encoders()
    assert row["licence"] == "not stated by timm"
