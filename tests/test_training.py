"""Training: losses against plain NumPy, and the loop under interruptions."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neurolib import swc, training, volume
from neurolib.blocking import Sample, make_target
from neurolib.course import runs
from neurolib.data import synthesis
from neurolib.data.pairs import Pair
from neurolib.errors import DataError, SettingsError, WeightsError
from neurolib.network import NetworkSettings, Segmenter, build
from neurolib.parameters import RANGES
from neurolib.swc import Tree
from neurolib.training import (
    LOSSES,
    SKELETON,
    THRESHOLDS,
    BlockSource,
    TrainingSettings,
    ValidationBlocks,
    augment,
    load_checkpoint,
    loss_terms,
    parameter_groups,
    restore,
    save_checkpoint,
    schedule,
    soft_cldice,
    soft_dice,
    soft_skeleton,
    train,
    validate,
    validation_blocks,
)

# timm's own test model: 6 layers of 64 channels.
NETWORK = NetworkSettings(encoder="test_vit", depth=3, block=48, size=48, width=32)
FAST = TrainingSettings(
    steps=6,
    batch=2,
    loss="dice+ce+skeleton",
    frozen=False,
    negatives=0.25,
    validate_every=3,
    validation_blocks=4,
    save_every=2,
    seed=1,
    precision="32-true",
)


def tubes(name, seed, shape=(9, 64, 80)):
    """A sample of three straight neurites in noise."""
    rng = np.random.default_rng(seed)
    ends = rng.uniform((4, 4, 2), (shape[2] - 5, shape[1] - 5, shape[0] - 3), (3, 2, 3))
    ends[:, 1, :2] = (np.array(shape[2:0:-1]) - 5) - ends[:, 0, :2]
    tree = Tree(
        ends.reshape(-1, 3), np.full(6, 1.5), np.full(6, 3), np.array([-1, 0, -1, 2, -1, 4])
    )
    response, mask = make_target(tree, shape)
    image = np.clip(0.8 * mask + rng.normal(0.1, 0.05, shape), 0, 1).astype(np.float32)
    pair = Pair(name, name, Path(f"{name}.tif"), Path(f"{name}.swc"), "synthetic")
    return Sample(pair, image, (1.0, 1.0, 1.0), tree, response, mask)


@pytest.fixture(scope="module")
def samples():
    return [tubes("a", 0), tubes("b", 1)]


@pytest.fixture(scope="module")
def checks():
    return [tubes("v", 2)]


# ------------------------------------------------------------------------------- losses


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 1, 16, 16))
    response = rng.uniform(0, 1, (3, 1, 16, 16)) ** 3
    return logits, response


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def tube_batch():
    """Noisy logits with half a gap, and masks (2, 1, 40, 40), of a bent tube."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    tube = ((y - 20 - 6 * torch.sin(x / 6)).abs() < 2).float()
    doubt = torch.randn(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    logits = 3 * (2 * tube - 1) + doubt
    logits[:, :, :, 18:22] -= 3
    return logits.double(), tube.expand(2, 1, 40, 40).double()


def test_dice_and_cldice_are_monais():
    from monai import losses as monai

    logits, mask = tube_batch()
    for _ in range(2):
        # MONAI computes clDice per image, we per batch.
        one, two = logits[:1], mask[:1]
        cldice = monai.SoftclDiceLoss(iter_=3, smooth=1e-12)(one.sigmoid(), two)
        assert soft_cldice(one, two).item() == pytest.approx(cldice.item(), abs=1e-6)
        dice = monai.DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)(logits, mask)
        assert soft_dice(logits, mask).item() == pytest.approx(dice.item(), abs=1e-6)
        logits = logits * 0.2 - 1


def test_soft_skeleton_is_the_middle_of_a_tube():
    _, mask = tube_batch()
    skeleton = soft_skeleton(mask)
    assert set(skeleton.unique().tolist()) == {0.0, 1.0}
    assert (skeleton <= mask).all()
    # Every column of the tube keeps one or two voxels of four.
    width = skeleton[0, 0].sum(0)[3:-3]
    assert width.min() >= 1
    assert width.max() <= 3


def test_cldice_pulls_the_gap_shut():
    logits, mask = tube_batch()
    logits.requires_grad_()
    before = soft_cldice(logits, mask)
    (gradient,) = torch.autograd.grad(before, logits)
    gap = mask.bool().clone()
    gap[..., :18], gap[..., 22:] = False, False
    assert gradient[gap].sum() < 0
    assert soft_cldice(logits - 100 * gradient, mask) < before


@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_every_term_is_its_definition_over_the_whole_batch(batch, tau):
    logits, response = batch
    response[1] = 0  # a block without foreground
    mask, skeleton, p = response >= tau, response >= SKELETON, sigmoid(logits)
    ce = -np.log(np.where(mask, p, 1 - p))
    expected = {
        "dice": 1 - (2 * p[mask].sum() + 1) / (p.sum() + mask.sum() + 1),
        "focal": (ce * np.where(mask, 1 - p, p) ** 2).mean(),
        "ce": ce.mean(),
        "skeleton": 1 - (p[skeleton].sum() + 1) / (skeleton.sum() + 1),
    }
    for name in LOSSES:
        terms = loss_terms(name, torch.tensor(logits), torch.tensor(response), tau)
        assert list(terms) == name.split("+")
        for term in terms.keys() & expected.keys():
            assert terms[term].item() == pytest.approx(expected[term], rel=1e-9), term


@pytest.mark.parametrize("name", ["dice+focal", "dice+ce+skeleton"])
def test_every_term_pulls_on_every_logit_in_the_right_direction(batch, name):
    _, response = batch
    response = torch.tensor(response)
    start = torch.zeros(response.shape, dtype=torch.float64, requires_grad=True)
    for term, value in loss_terms(name, start, response, 0.1).items():
        (gradient,) = torch.autograd.grad(value, start, retain_graph=True)
        wanted = response >= (SKELETON if term == "skeleton" else 0.1)
        assert (gradient[wanted] < 0).all(), term
        if term != "skeleton":
            assert (gradient[~wanted] > 0).all(), term


def test_pulls_are_minus_the_slopes_of_every_term(batch):
    logits, response = (torch.tensor(values) for values in batch)
    pulls = training.pulls(logits, response, 0.1)
    assert list(pulls) == ["dice", "focal", "ce", "skeleton", "cldice"]
    way = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()
    for name in LOSSES:
        ahead, behind = (loss_terms(name, logits + h * way, response, 0.1) for h in (1e-6, -1e-6))
        for term in ahead:
            slope = (ahead[term] - behind[term]).item() / 2e-6
            assert slope == pytest.approx(-(pulls[term] * way).sum().item(), rel=1e-3, abs=1e-8)
    assert not logits.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_voxels_count_in_no_term(batch, name):
    logits, response = (torch.tensor(values) for values in batch)
    unknown = torch.rand(response.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    partly = response.masked_fill(unknown, torch.nan)
    logits.requires_grad_()
    terms = loss_terms(name, logits, partly, 0.1)
    assert not torch.autograd.grad(sum(terms.values()), logits)[0][unknown].any()
    others = loss_terms(name, torch.where(unknown, -logits, logits), partly, 0.1)
    assert terms == others
    # Dice is that of the known voxels alone.
    p, mask = logits.sigmoid()[~unknown], (response >= 0.1)[~unknown]
    alone = 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    assert terms["dice"].item() == pytest.approx(alone.item(), rel=1e-9)


def test_unknown_voxels_stay_unknown_when_a_block_is_turned_and_zoomed(samples):
    response = samples[0].response.copy()
    response[:, :32] = np.nan
    blocks, responses = torch.rand(1, 1, 9, 64, 80), torch.from_numpy(response)[None]
    share = [
        augment(blocks, responses, torch.Generator().manual_seed(seed))[1].isnan().float().mean()
        for seed in range(12)
    ]
    assert all(0.35 < s < 0.65 for s in share), share


def test_the_loss_that_notebook_03_writes_by_hand_is_that_of_the_library(batch):
    """Also where the target is unknown; the notebook itself runs with known targets only."""
    code = (runs.NOTEBOOKS / "03_training.py").read_text(encoding="utf-8")
    names = {"torch": torch, "F": torch.nn.functional}
    exec(code[code.index("def dice_and_focal") : code.index("def loss_by_hand")], names)
    logits, response = (torch.tensor(values).float() for values in batch)
    response[..., ::3] = torch.nan
    ours = sum(loss_terms("dice+focal", logits, response, 0.1).values())
    assert names["dice_and_focal"](logits, response, 0.1) == ours


def test_everything_is_what_cldice_or_skeleton_recall_alone_would_be_content_with(batch):
    """So neither may be used alone."""
    response = torch.tensor(batch[1])
    everything = torch.full(response.shape, 40.0, dtype=torch.float64)
    terms = {}
    for name in LOSSES:
        terms |= loss_terms(name, everything, response, 0.2)
    assert {term for term, value in terms.items() if value < 1e-6} == {"skeleton", "cldice"}


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_a_perfect_answer_costs_nothing_at_any_threshold(batch, tau):
    response = torch.tensor(batch[1])
    logits = torch.where(response >= tau, 40.0, -40.0).double()
    for term, value in loss_terms("dice+ce+skeleton", logits, response, tau).items():
        assert value.item() == pytest.approx(0, abs=1e-9), term


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_skeleton_threshold_marks_the_centreline_and_its_neighbours(axis):
    """Five voxels across a straight neurite on voxel centres: exactly one voxel off counts."""
    shape = (11, 11, 11)
    ends = np.full((2, 3), 5.0)
    ends[:, 2 - axis] = 0, 10
    tree = Tree(ends, np.ones(2), np.full(2, 3), np.array([-1, 0]))
    response, _ = make_target(tree, shape)
    across = torch.from_numpy(response).select(axis, 5) >= SKELETON
    plus = torch.zeros(11, 11, dtype=torch.bool)
    plus[5, 4:7] = plus[4:7, 5] = True
    assert torch.equal(across, plus)


# ------------------------------------------------------------------------ rates, schedule


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Segmenter(dataclasses.replace(NETWORK, stem=True))


def test_every_parameter_is_in_one_group_with_its_rate_and_decay(network):
    settings = TrainingSettings(encoder_rate=1e-4, decoder_rate=1e-3, layer_decay=0.5)
    groups = parameter_groups(network, settings)
    by_parameter = {}
    for group in groups:
        assert group["lr"] == group["peak"]
        for parameter in group["params"]:
            assert id(parameter) not in by_parameter
            by_parameter[id(parameter)] = group
    names = dict(network.named_parameters())
    assert by_parameter.keys() == {id(p) for p in names.values()}
    for name, power in {
        "encoder.patch_embed.proj.weight": 7,
        "encoder.pos_embed": 7,
        "encoder.cls_token": 7,
        "encoder.blocks.0.attn.qkv.weight": 6,
        "encoder.blocks.3.norm1.bias": 3,
        "encoder.blocks.5.mlp.fc2.weight": 1,
        "encoder.norm.weight": 0,
    }.items():
        assert by_parameter[id(names[name])]["lr"] == pytest.approx(1e-4 * 0.5**power)
    for name, parameter in names.items():
        group = by_parameter[id(parameter)]
        if not name.startswith("encoder."):
            assert group["lr"] == 1e-3, name
        matrix = name.endswith("weight") and "norm" not in name and parameter.ndim > 1
        assert group["weight_decay"] == (0.05 if matrix else 0), name


def test_frozen_encoder_is_in_no_group(network):
    for parameter in network.encoder.parameters():
        parameter.requires_grad_(False)
    try:
        members = [p for g in parameter_groups(network, FAST) for p in g["params"]]
    finally:
        for parameter in network.encoder.parameters():
            parameter.requires_grad_(True)
    outside = [p for n, p in network.named_parameters() if not n.startswith("encoder.")]
    assert {id(p) for p in members} == {id(p) for p in outside}


def test_schedule_warms_up_and_falls_as_half_a_cosine():
    settings = TrainingSettings(steps=200, warmup=0.05)
    rates = [schedule(step, settings) for step in range(200)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1
    assert rates[10 + 95] == pytest.approx(0.505)
    assert (np.diff(rates[10:]) < 0).all()
    assert 0.01 <= rates[-1] < 0.011
    assert [schedule(0, TrainingSettings(steps=n)) for n in (1, 2)] == [1, 1]


FIELDS = dataclasses.asdict(TrainingSettings())
BAD = [("loss", "mse"), ("decoder_rate", math.nan), ("negatives", math.inf)]
BAD += [(name, -1) for name in FIELDS if name in RANGES]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_unusable_settings_are_refused_in_one_line(name, value):
    with pytest.raises(SettingsError, match=f"{name}=.*: expected") as error:
        TrainingSettings(**{name: value})
    assert "\n" not in str(error.value)


def test_defaults_are_those_of_the_notebook():
    """They are repeated in the notebook for readers to change."""
    notebook = runs.notebook_parameters("03_training")
    shared = FIELDS.keys() & notebook.keys()
    assert len(shared) == 15
    assert {k: FIELDS[k] for k in shared} == {k: notebook[k] for k in shared}


@pytest.mark.parametrize("bad", [{"device": "tpu9"}, {"precision": "7-bit"}, {"device": "cuda"}])
def test_device_or_precision_that_does_not_exist_is_refused(bad):
    ((name, value),) = bad.items()
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SettingsError, match=f"{name}='{value}'.*(try|expected)"):
        training.start_fabric(**bad)


# ------------------------------------------------------------------------------- batches


def test_an_epoch_visits_every_place_once_and_the_next_in_another_order(samples, monkeypatch):
    monkeypatch.setattr(training, "STRIDE", 16)
    source = BlockSource(samples, 3, 48, seed=4)
    n = len(source)
    assert n > 20
    first, second = ([source._row(i + n * epoch) for i in range(n)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second
    assert set(source.places[:, 0]) == {0, 1}


def test_batches_depend_on_seed_and_step_alone(samples):
    one, same, other = (BlockSource(samples, 3, 48, seed=s) for s in (4, 4, 5))
    for step in (7, 0, 3):
        assert all(map(torch.equal, one.batch(step, 3), same.batch(step, 3)))
    assert not torch.equal(one.batch(0, 3)[0], other.batch(0, 3)[0])
    assert not torch.equal(one.batch(0, 3)[0], one.batch(1, 3)[0])


def test_blocks_and_responses_come_from_the_same_place(samples):
    source = BlockSource(samples, 3, 48, 0.25, seed=0)
    blocks, responses = source.batch(0, 5)
    assert blocks.shape == (5, 1, 3, 48, 48)
    assert responses.shape == (5, 3, 48, 48)
    assert blocks.dtype == responses.dtype == torch.float32
    # The image of `tubes` is bright on its mask: 0.9 against 0.1.
    on = responses >= 0.1
    assert blocks[:, 0][on].mean() > 0.8
    assert blocks[:, 0][~on].mean() < 0.2
    number, z, y, x = source.places[source._row(0)]
    there = samples[number].image[max(z - 1, 0) : z + 2, y : y + 48, x : x + 48]
    assert np.array_equal(blocks[0, 0].numpy()[-len(there) :], there)


def test_share_of_blocks_without_foreground(samples, monkeypatch):
    monkeypatch.setattr(training, "STRIDE", 8)
    only, some = (BlockSource(samples, 3, 24, negatives) for negatives in (0, 0.25))
    for number, z, y, x in only.places:
        assert samples[number].mask[z, y : y + 24, x : x + 24].sum() >= 0.001 * 24 * 24
    assert len(only) < len(some) <= math.ceil(1.25 * len(only)) + 1


def test_no_salient_block_is_a_data_error_that_names_the_volumes(samples):
    empty = dataclasses.replace(samples[0], mask=np.zeros_like(samples[0].mask))
    with pytest.raises(DataError, match=r"\(a\)"):
        BlockSource([empty], 3, 48)
    with pytest.raises(DataError, match="none"):
        BlockSource([], 3, 48)


# ------------------------------------------------------------------------- augmentation


def marked(n=64, side=24):
    """Blocks (n, 1, 5, side, side) with one bright patch each; the response is the block."""
    rng = np.random.default_rng(0)
    blocks = torch.zeros(n, 1, 5, side, side)
    for block in blocks:
        y, x = rng.integers(3, side - 6, 2)
        block[0, 2, y : y + 3, x : x + 3] = 1
    return blocks, blocks[:, 0].clone()


def test_augmentation_moves_block_and_response_alike():
    blocks, responses = marked()
    out, moved = augment(blocks, responses, torch.Generator().manual_seed(0))
    assert out.shape == blocks.shape
    assert moved.shape == responses.shape
    centres = torch.arange(24.0)
    moves = 0
    for block, response, before in zip(out[:, 0], moved, responses, strict=True):
        # The patch stays in the centre slice, at the same place in block and response.
        assert response[2].sum() > 0
        assert response[[0, 1, 3, 4]].sum() == 0
        bright = block[2] * (block[2] > 0.3)
        for dim, axis in ((1, "y"), (0, "x")):
            a = (bright.sum(dim) * centres).sum() / bright.sum()
            b = (response[2].sum(dim) * centres).sum() / response[2].sum()
            assert a.item() == pytest.approx(b.item(), abs=0.5), axis
        moves += not torch.equal(response, before)
    assert moves > 40


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_zoom_scales_the_tree_and_not_the_tube(factor):
    """The target of a zoomed block is the target of the zoomed tree."""
    centre, nodes = np.array([49.5, 49.5]), np.array([[20.0, 31.0], [60.0, 45.0], [78.0, 80.0]])

    def target(scale):
        xy = (nodes - centre) * scale + centre
        tree = Tree(
            np.column_stack([xy, np.full(3, 2.0)]), np.ones(3), np.full(3, 2), np.array([-1, 0, 1])
        )
        response, _ = make_target(tree, (5, 100, 100))
        return torch.from_numpy(response)

    _, moved = training.zoom(torch.zeros(5, 100, 100), target(1), factor)
    wanted, zoomed = target(factor) >= 0.1, moved >= 0.1  # also beside the slice with the neurite
    assert 2 * (wanted & zoomed).sum() / (wanted.sum() + zoomed.sum()) > 0.97


def test_augmentation_keeps_the_range_and_its_input_and_follows_its_generator_only(samples):
    given = BlockSource(samples, 3, 48).batch(0, 40)
    before = [values.clone() for values in given]
    variants = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(variants))
        variants.append(augment(*given, torch.Generator().manual_seed(seed)))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*variants[:2], strict=True))
    assert not torch.equal(variants[0][0], variants[2][0])
    for values in variants[0]:
        assert 0 <= values.min() <= values.max() <= 1


def test_augmentation_turns_z_over_and_blanks_slices_but_never_the_centre(monkeypatch):
    monkeypatch.setattr(training, "zoom", lambda block, response, factor: (block, response))
    n = 300
    blocks = torch.full((n, 1, 5, 8, 8), 0.5)
    responses = torch.arange(5.0).view(1, 5, 1, 1).expand(n, 5, 8, 8) / 10
    out, moved = augment(blocks, responses, torch.Generator().manual_seed(0))
    blank = (out[:, 0] == 0).flatten(2).all(2)
    assert not blank[:, 2].any()
    assert blank.sum(1).max() == 1
    assert 0.05 < blank.any(1).float().mean() < 0.17
    assert set(torch.nonzero(blank)[:, 1].tolist()) == {0, 1, 3, 4}
    turned = moved[:, 0, 4, 4] > moved[:, 4, 4, 4]
    assert 0.4 < turned.float().mean() < 0.6
    assert torch.allclose(moved[:, 2], torch.tensor(0.2))


# ------------------------------------------------------------------------------ validation


class Known(torch.nn.Module):
    """A network whose probability is the image, moved by a gain on the logits."""

    settings = NETWORK

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(()))

    def forward(self, blocks):
        return torch.logit(blocks[:, 0, 1:2]) + self.gain


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_validation_dice_is_the_mean_over_volumes_at_one_common_threshold(precision):
    rng = np.random.default_rng(0)
    checks = []
    for n in (3, 11):
        response = torch.from_numpy(rng.uniform(0, 1, (n, 3, 16, 16)).astype(np.float32))
        noise = torch.from_numpy(rng.uniform(-0.3, 0.3, (n, 3, 16, 16)).astype(np.float32))
        blocks = (response + noise).clamp(0.01, 0.99)[:, None]
        checks.append(ValidationBlocks(blocks, response, torch.arange(1.0, n + 1)))

    # The weights passed count, not the module's.
    weights = {"gain": torch.tensor(0.5)}
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        dice, threshold = validate(Known(), weights, checks, tau=0.4)
    rows = []
    for check in checks:
        p = sigmoid(torch.logit(check.blocks[:, 0, 1]).numpy() + 0.5)
        mask = check.responses[:, 1].numpy() >= 0.4
        weight = np.arange(1.0, len(p) + 1)[:, None, None]
        rows.append(
            [
                2
                * (weight * (mask & (p >= t))).sum()
                / ((weight * mask).sum() + (weight * (p >= t)).sum())
                for t in THRESHOLDS
            ]
        )
    mean = np.mean(rows, axis=0)
    assert dice == pytest.approx(mean.max(), rel=1e-5)
    assert threshold == THRESHOLDS[mean.argmax()]
    assert 0.4 < threshold < 0.7


def test_validation_estimates_the_dice_of_the_whole_volume(checks):
    """A few blocks represent all: the estimate is near that of all blocks."""
    sample = tubes("big", 3, shape=(30, 192, 192))
    rng = np.random.default_rng(1)
    # The Dice of salient blocks alone would miss most of these false alarms.
    image = np.clip(sample.response + (rng.random(sample.mask.shape) < 0.01), 0.01, 0.99)
    sample = dataclasses.replace(sample, image=image.astype(np.float32))
    guess = sample.image >= 0.1
    whole = 2 * (guess & sample.mask).sum() / (guess.sum() + sample.mask.sum())
    estimates = {}
    for count in (10_000, 60):
        settings = dataclasses.replace(FAST, validation_blocks=count)
        check = validation_blocks(sample, NETWORK, settings)
        assert check.weight.sum().item() == pytest.approx(30 * 4 * 4, rel=1e-5)
        weights = {"gain": torch.logit(torch.tensor(0.5)) - torch.logit(torch.tensor(0.1))}
        assert len(check.blocks) == len(check.weight) <= count
        estimates[count], _ = validate(Known(), weights, [check], 0.1)
    # The grid of 48 tiles 192 without overlap, so that all blocks are the whole volume.
    assert estimates[10_000] >= whole - 1e-6
    assert estimates[60] == pytest.approx(estimates[10_000], rel=0.15)
    only = check._replace(weight=torch.ones_like(check.weight))
    assert validate(Known(), weights, [only], 0.1)[0] > 1.15 * estimates[10_000]


def test_validation_blocks_are_spread_over_both_kinds(checks):
    settings = dataclasses.replace(FAST, validation_blocks=8)
    check = validation_blocks(checks[0], NETWORK, settings)
    assert len(check.blocks) == len(check.responses) == len(check.weight) <= 8
    foreground = (check.responses[:, 1] >= 0.1).flatten(1).float().mean(1) >= 0.001
    assert 0 < foreground.sum() <= 4
    assert len({block.sum().item() for block in check.blocks}) == len(check.blocks)
    one = dataclasses.replace(FAST, validation_blocks=1)
    assert len(validation_blocks(checks[0], NETWORK, one).blocks) >= 1


# --------------------------------------------------------------------------------- the loop


@pytest.fixture
def fit(tmp_path, samples, checks):
    """A function that trains this network, or a new one of this seed, in a folder of the test."""

    def fit(network=0, folder="", data=samples, checks=checks, on_step=lambda row: None, **changes):
        if isinstance(network, int):
            network, _ = build(NETWORK, "scratch", seed=network)
        settings = dataclasses.replace(FAST, **changes)
        return network, train(network, data, checks, tmp_path / folder, settings, on_step=on_step)

    return fit


def copy(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_a_checkpoint_knows_its_target(fit, checks, tmp_path):
    _, result = fit(steps=1, checks=[dataclasses.replace(one, kind="radius") for one in checks])
    assert load_checkpoint(result.checkpoint)[1]["target"] == "radius"
    target = runs._target_of(str(result.checkpoint), tmp_path / "another run")
    assert target == {"target": "radius", "tau": 0.1}


def test_training_on_tubes_learns_them(fit, tmp_path, checks):
    network, _ = build(dataclasses.replace(NETWORK, stem=True), "scratch", seed=0)
    seen, how = [], {"steps": 40, "batch": 4, "validate_every": 40, "save_every": 40}
    _, result = fit(network, on_step=seen.append, decoder_rate=5e-3, average=0.8, **how)
    losses = [row["loss"] for row in result.history]
    assert seen == result.history
    assert [row["step"] for row in seen] == list(range(1, 41))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    # All voxels called foreground would give 0.1.
    assert result.dice > 0.4
    assert result.step == 40
    for row in seen:
        assert row["loss"] == pytest.approx(row["dice"] + row["ce"] + row["skeleton"], rel=1e-5)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,dice,ce,skeleton")
    assert len(lines) == 41
    # The network has the checkpoint's weights, and it finds the tubes.
    loaded, facts = load_checkpoint(result.checkpoint)
    assert facts["dice"] == result.dice
    check = validation_blocks(checks[0], network.settings, FAST)
    again, threshold = validate(loaded, loaded.state_dict(), [check], 0.1)
    assert again == pytest.approx(result.dice, abs=1e-6)
    assert threshold == facts["threshold"]


def test_frozen_training_leaves_the_encoder_and_its_file_out(fit):
    network, _ = build(NETWORK, "scratch", seed=2)
    before = copy(network)
    _, result = fit(network, frozen=True, loss="dice+focal")
    after = network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("encoder."))
    assert not torch.equal(after["head.1.weight"], before["head.1.weight"])
    assert not any(key.startswith("encoder.") for key in load_file(result.checkpoint))
    assert same(load_checkpoint(result.checkpoint)[0].state_dict(), after)


def test_frozen_checkpoint_is_rebuilt_from_its_own_weights_file_only(fit, tmp_path):
    def write(seed):
        torch.manual_seed(seed)
        flat = Segmenter(NETWORK).encoder.state_dict()
        flat["patch_embed.proj.weight"] = torch.randn(64, 3, 16, 16)
        save_file(flat, tmp_path / "mine.safetensors")

    write(1)
    network, _ = build(NETWORK, "center", str(tmp_path / "mine.safetensors"), seed=6)
    _, result = fit(network, frozen=True, steps=1)
    assert same(load_checkpoint(result.checkpoint)[0].state_dict(), network.state_dict())
    write(2)
    with pytest.raises(WeightsError, match="frozen encoder"):
        load_checkpoint(result.checkpoint)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    fit, tmp_path, samples
):
    network, _ = build(NETWORK, "scratch", seed=0)
    bad = dataclasses.replace(samples[0], image=np.full_like(samples[0].image, np.nan))
    with pytest.raises(SettingsError, match=r"step 1: the loss is nan.*; lower.*: none$") as error:
        fit(network, "bad", [bad])
    assert "\n" not in str(error.value)

    def poison(row):
        if row["step"] == 4:
            network.head[1].bias.data.fill_(math.nan)

    # The same network: gradients of the failed run must not leak into this one.
    said = r"step 5: the loss is nan.*late/checkpoint.safetensors: 3$"
    with pytest.raises(SettingsError, match=said):
        fit(network, "late", on_step=poison)
    kept, facts = load_checkpoint(tmp_path / "late" / "checkpoint.safetensors")
    assert facts["step"] == 3
    assert all(torch.isfinite(value).all() for value in kept.state_dict().values())


def test_finite_loss_with_an_infinite_gradient_stops_the_run_too(fit, monkeypatch):
    network, _ = build(NETWORK, "scratch", seed=0)
    before = copy(network)
    # The slope of a root at zero is infinite, its value is not.
    monkeypatch.setattr(
        training, "loss_terms", lambda _, logits, *__: {"root": (logits * 0).abs().sqrt().sum()}
    )
    with pytest.raises(SettingsError, match="step 1: the loss is 0 and its gradient nan"):
        fit(network)
    assert same(before, network.state_dict())


@pytest.mark.parametrize("kind", ["card", "torch", "NumPy", "moments", "another"])
def test_out_of_memory_proposes_what_to_lower(kind, fit, monkeypatch):
    errors = {
        "card": torch.OutOfMemoryError("CUDA out of memory"),
        "NumPy": MemoryError(),
        "another": RuntimeError("shapes do not match"),
    }

    def exhausted(*_, **__):
        if kind in errors:
            raise errors[kind]
        torch.empty(10**15)  # no machine has that

    where = (torch.optim.AdamW, "step") if kind == "moments" else (training, "loss_terms")
    monkeypatch.setattr(*where, exhausted)
    said = "shapes do" if kind == "another" else r"batch=2.*accumulate=2.*size=48.*checkpointing"
    with pytest.raises(RuntimeError if kind == "another" else SettingsError, match=said):
        fit()
    if kind == "NumPy":  # a frozen encoder has nothing to recompute, and one block is the least
        with pytest.raises(SettingsError, match=r"^out of memory; lower size=48$"):
            fit(frozen=True, batch=1)


def test_checkpointing_recomputes_the_same_gradients(samples):
    blocks, responses = BlockSource(samples, 3, 48).batch(0, 2)
    gradients = []
    for checkpointing in (False, True):
        network, _ = build(NETWORK, "scratch", seed=0)
        network.encoder.set_grad_checkpointing(checkpointing)
        loss = sum(loss_terms("dice+focal", network(blocks), responses[:, 1:2], 0.1).values())
        loss.backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_patience_stops_and_a_second_call_does_not_go_on(fit, monkeypatch):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(training, "validate", lambda *_: (next(scores), 0.5))
    _, result = fit(validate_every=1, patience=2)
    assert (result.step, result.dice, len(result.history)) == (2, 0.5, 4)
    _, again = fit(validate_every=1, patience=2)
    assert [row["step"] for row in again.history] == [1, 2, 3, 4]


def test_finished_run_is_not_trained_again_and_other_settings_start_anew(fit, samples):
    def steps(network=0, **given):
        rows = []
        fit(network, on_step=rows.append, steps=2, save_every=1, **given)
        return len(rows)

    assert [steps(), steps()] == [2, 0]
    assert [steps(decoder_rate=2e-3), steps(decoder_rate=2e-3)] == [2, 0]
    assert steps(1, decoder_rate=2e-3) == 2
    assert steps(1, decoder_rate=2e-3, data=samples[:1]) == 2
    # Other images behind the same trees, in training or in validation.
    brighter = [dataclasses.replace(samples[0], image=samples[0].image ** 0.5)]
    assert steps(1, decoder_rate=2e-3, data=brighter) == 2
    assert steps(1, decoder_rate=2e-3, data=brighter, checks=brighter) == 2
    assert steps(1, decoder_rate=2e-3, data=brighter, checks=brighter) == 0


def test_a_checkpoint_is_not_tested_on_what_it_has_seen(fit, samples, checks):
    _, result = fit(steps=1)
    _, facts = load_checkpoint(result.checkpoint)
    training.check_unseen(facts, [tubes("t", 3)], result.checkpoint)
    # The same volume under another name.
    renamed = dataclasses.replace(samples[1], pair=tubes("t", 3).pair)
    for known in (samples[0], checks[0], renamed):
        with pytest.raises(DataError, match=r"trained or validated on [abv], so a test on"):
            training.check_unseen(facts, [tubes("t", 3), known], result.checkpoint)


def test_a_network_has_seen_what_the_one_it_continues_from_had(fit, samples):
    _, first = fit(0, "first", samples[:1], frozen=True, steps=1)
    network, _ = build(NETWORK, "scratch", seed=0)
    restore(network, first.checkpoint)
    _, second = fit(network, "second", samples[1:], frozen=True, steps=1)
    facts = load_checkpoint(second.checkpoint)[1]
    assert set(facts["seen"].values()) == {"a", "b", "v"}
    with pytest.raises(DataError, match="trained or validated on a,"):
        training.check_unseen(facts, samples[:1], second.checkpoint)


def test_training_without_validation_is_refused_before_it_begins(fit, tmp_path):
    with pytest.raises(DataError, match="hold out at least one"):
        fit(checks=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("at", "kept"), [(1, True), (3, True), (5, False)], ids=["cell", "later cell", "process"]
)
def test_a_stopped_run_goes_on_to_bit_equal_files(at, kept, fit, tmp_path):
    """The interrupt button of a notebook leaves a changed network, a killed process leaves none.

    Steps 3 and 6 write a checkpoint, steps 2, 4 and 6 a resume file.
    """

    def stop(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    network, _ = build(NETWORK, "scratch", seed=3)
    with pytest.raises(KeyboardInterrupt):
        fit(network, "stopped", on_step=stop)
    rows = []
    network, result = fit(network if kept else 3, "stopped", on_step=rows.append)
    assert [row["step"] for row in rows] == list(range(at // 2 * 2 + 1, 7))
    other, whole = fit(3, "whole")
    assert (result.history, result.dice) == (whole.history, whole.dice)
    assert same(network.state_dict(), other.state_dict())
    for name in ("checkpoint.safetensors", "resume.safetensors"):
        assert same(*(load_file(tmp_path / run / name) for run in ("stopped", "whole")))
    # The third call has nothing to do.
    fit(network, "stopped", on_step=rows.append)
    assert len(rows) == 6 - at // 2 * 2


# ------------------------------------------------------------------------- two processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def python(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


PAIR = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_training import NETWORK, TWO, tubes
from neurolib.network import build
from neurolib.training import train

network, _ = build(NETWORK, "scratch", seed=3)
train(network, [tubes("a", 0), tubes("b", 1)], [tubes("v", 2)], sys.argv[1], TWO)
"""
TWO = dataclasses.replace(FAST, steps=2, save_every=1, augment=False, clip=1e9, warmup=0.0)


def test_two_processes_step_along_the_mean_of_their_gradients(tmp_path, samples):
    """They see different blocks; the first moments after two steps reveal the mean gradients."""
    script = tmp_path / "pair.py"
    script.write_text(PAIR.format(tests=str(Path(__file__).parent)))
    done = python(*TORCHRUN, script, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]

    network, _ = build(NETWORK, "scratch", seed=3)
    network.encoder.norm.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(network, TWO))
    source = BlockSource(samples, 3, 48, TWO.negatives, seed=TWO.seed)
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, TWO)
        optimizer.zero_grad()
        for rank in range(2):
            blocks, responses = source.batch(2 * step + rank, TWO.batch)
            terms = loss_terms(TWO.loss, network(blocks), responses[:, 1:2], 0.1)
            (sum(terms.values()) / 2).backward()
        optimizer.step()
    shared = load_file(tmp_path / "run" / "resume.safetensors")
    for number, entry in optimizer.state_dict()["state"].items():
        moment = shared[f"optimizer.{number}.exp_avg"]
        torch.testing.assert_close(moment, entry["exp_avg"], rtol=1e-3, atol=1e-6)

    # One process that accumulates two passes per step takes the same steps.
    network, _ = build(NETWORK, "scratch", seed=3)
    alone = dataclasses.replace(TWO, accumulate=2)
    train(network, samples, [tubes("v", 2)], tmp_path / "alone", alone)
    weights = load_file(tmp_path / "alone" / "resume.safetensors")
    assert weights.keys() == shared.keys()
    for key, value in weights.items():
        if key.startswith("network."):
            torch.testing.assert_close(shared[key], value, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path, network):
    path = tmp_path / "checkpoint.safetensors"
    facts = {"dice": 0.5, "step": 3, "threshold": 0.4, "tau": 0.1}
    facts["training"] = dataclasses.asdict(FAST)
    save_checkpoint(path, network, network.state_dict(), facts)
    return path


def test_checkpoint_rebuilds_the_network(checkpoint, network):
    loaded, facts = load_checkpoint(checkpoint)
    assert loaded.settings == network.settings
    assert not loaded.training
    assert same(loaded.state_dict(), network.state_dict())
    assert (facts["dice"], facts["step"], facts["threshold"]) == (0.5, 3, 0.4)
    assert TrainingSettings(**facts["training"]) == FAST
    checkpoint.with_name("other").touch()
    assert checkpoint.stat().st_mode == checkpoint.with_name("other").stat().st_mode


def test_frozen_training_from_a_checkpoint_keeps_the_encoder_it_started_from(fit, checkpoint):
    """Pre-trained weights cannot replace it, so it must be in the file."""
    network, _ = build(dataclasses.replace(NETWORK, stem=True), "scratch", seed=5)
    restore(network, checkpoint)
    before = copy(network.encoder)
    _, result = fit(network, frozen=True, steps=1)
    assert same(before, load_checkpoint(result.checkpoint)[0].encoder.state_dict())


def test_a_decoder_is_not_joined_to_an_encoder_it_was_not_trained_behind(tmp_path):
    one, other = (build(NETWORK, "scratch", seed=seed)[0] for seed in (5, 6))
    facts = {"training": dataclasses.asdict(FAST) | {"frozen": True}}
    save_checkpoint(tmp_path / "frozen", one, one.state_dict(), facts)
    with pytest.raises(WeightsError, match=r"frozen encoder with other weights.*'scratch'"):
        restore(other, tmp_path / "frozen")
    restore(one, tmp_path / "frozen")


def test_checkpoint_that_is_cut_missing_or_of_another_network_is_refused(checkpoint, tmp_path):
    data = checkpoint.read_bytes()
    other = dataclasses.replace(NETWORK, depth=5)
    said = r"start_from=.*: has depth=3.*, but this network has depth=5"
    with pytest.raises(WeightsError, match=said) as error:
        restore(Segmenter(other), checkpoint)
    assert "\n" not in str(error.value)
    for content in (None, b"", data[:7], data[:200], data[:-1], b"not a checkpoint at all"):
        checkpoint.unlink(missing_ok=True)
        if content is not None:
            checkpoint.write_bytes(content)
        said = "no such" if content is None else "not a readable"
        with pytest.raises(WeightsError, match=f"{said} checkpoint") as error:
            load_checkpoint(checkpoint)
        assert "\n" not in str(error.value)


FOREIGN = [None, {"network": "{}"}, {"network": "no json", "facts": "{}"}]
FOREIGN += [{"network": '{"surprise": 1}', "facts": "{}"}, {"network": "{}", "facts": "{}"}]
FOREIGN += [{"network": "[1]", "facts": "[]"}]


@pytest.mark.parametrize("metadata", FOREIGN, ids=str)
def test_foreign_file_is_refused(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata)
    with pytest.raises(WeightsError, match="not a checkpoint of this package"):
        load_checkpoint(path)


@pytest.mark.parametrize("part", ["weights", "facts"])
def test_a_checkpoint_with_a_changed_byte_is_refused(checkpoint, part):
    """Flip one bit at each of many places."""
    whole = checkpoint.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    threshold = whole.index(b"threshold")
    places = range(start, len(whole), (len(whole) - start) // 7)
    for place in places if part == "weights" else range(threshold + 13, threshold + 15):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        checkpoint.write_bytes(damaged)
        with pytest.raises(WeightsError):
            load_checkpoint(checkpoint)


# ------------------------------------------------------------------------------- profile


SMALL = {"encoder": "test_vit.r160_in1k", "initialisation": "scratch", "size": 96}
SMALL |= {"device": "cpu", "steps": 2, "batch": 2, "validation_blocks": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three synthetic neurons as pairs in a folder."""
    data = tmp_path_factory.mktemp("data")
    for seed in range(3):
        tree = synthesis.grow(seed, (24, 64, 64))
        swc.write_swc(data / f"cell{seed}.swc", tree)
        stack = synthesis.render(tree, (24, 64, 64), seed=seed)
        volume.write_volume(data / f"cell{seed}.tif", stack.data)
    return data


def test_torchrun_trains_and_the_notebook_goes_on_from_there(tmp_path, data):
    """Two processes train; the notebook then has nothing left to train."""
    given = [part for item in SMALL.items() for part in ("-p", "{}={}".format(*item))]
    command = [*TORCHRUN, "-m", "neurolib", "train", "--data", data, "--profile", "empty"]
    done = python(*command, "--name", "x", "--folder", tmp_path, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    before = load_file(tmp_path / "x" / "checkpoint.safetensors")
    history = (tmp_path / "x" / "history.csv").read_text()
    assert len(history.splitlines()) == 3
    run = runs.run_course(str(data), "empty", "x", tmp_path, SMALL, ("03_training",))
    after = load_file(run.path("checkpoint.safetensors"))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert run.path("history.csv").read_text() == history
    # A single process sees half of the blocks and ends with other weights.
    alone = runs.train_run(str(data), "empty", "alone", tmp_path, SMALL)
    other = load_file(alone.path("checkpoint.safetensors"))
    assert not all(torch.equal(other[key], value) for key, value in before.items())


def test_the_gpu_profile_runs_through_the_notebook_on_a_cpu(tmp_path, data):
    """Two steps of a small network, with the other settings of the profile, such as bfloat16."""
    name = "03_training"
    known = runs.notebook_parameters(name)
    profile = {k: v for k, v in runs.read_profile("gpu").items() if k in known}
    profile = runs.choose_parameters(profile, {name: known})[name]
    run = runs.run_course(str(data), "empty", "x", tmp_path, profile | SMALL, (name,))
    _, facts = load_checkpoint(run.path("checkpoint.safetensors"))
    asked = {k: v for k, v in (profile | SMALL).items() if k in facts["training"]}
    assert facts["training"].items() >= asked.items()
    assert asked["precision"] == "bf16-mixed"
    assert facts["step"] == 2
    assert 0 <= facts["dice"] <= 1
