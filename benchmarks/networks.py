"""Benchmarks of prediction and training: stitching, depth, skipping, and rates on a GPU."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from measure import Scale, compete, installed, line, missing, seconds, size
from skipping import skipping
from torch import nn

from neurolib import blocking, inference
from neurolib.data import synthesis
from neurolib.network import NetworkSettings, Segmenter, cost
from neurolib.training import TrainingSettings, loss_terms, parameter_groups
from neurolib.volume import normalise

BATCH = 8  # tiles per pass, ours and theirs
# A training step costs about three forward passes: one forward, two backward (gradients of inputs
# and weights).
PASSES = 3
NO_GPU = "not measured: no GPU"


class Identity(nn.Module):
    """Replaces a network: its logits are the tile, so that only stitching takes time."""

    def __init__(self, predict: str):
        super().__init__()
        self.settings = SimpleNamespace(depth=5, block=100, predict=predict)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[:, 0] if self.settings.predict == "all" else blocks[:, 0, 2:3]


def monai_slices(
    network: nn.Module, image: np.ndarray, overlap: float, device: str = "cpu"
) -> np.ndarray:
    """MONAI on the tiles of `predict_volume`: slices are its batch, neighbours its channels.

    The blocks are views of the image, so that only MONAI copies.
    """
    from monai.inferers import SlidingWindowInferer

    depth, side = network.settings.depth, network.settings.block
    inferer = SlidingWindowInferer((side, side), BATCH, overlap, mode=_mode(overlap))
    padding = (0, 0, 0, 0, depth // 2, depth // 2)
    padded = F.pad(torch.from_numpy(image).to(device)[None], padding, mode="replicate")[0]
    tiles = padded.unfold(0, depth, 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        probability = inferer(tiles, lambda windows: network(windows[:, None]).float().sigmoid())
    return probability[:, 0].cpu().numpy()


def monai_windows(network: nn.Module, image: np.ndarray, overlap: float, step: int) -> np.ndarray:
    """MONAI on windows (depth, side, side), every `step` slices; each votes on all its slices."""
    from monai.inferers import SlidingWindowInferer

    depth, side = network.settings.depth, network.settings.block
    # MONAI rounds steps down.
    overlaps = (1 - (step + 0.5) / depth, overlap, overlap)
    inferer = SlidingWindowInferer((depth, side, side), BATCH, overlaps, mode=_mode(overlap))
    with torch.inference_mode():
        tiles = torch.from_numpy(image)[None, None]
        probability = inferer(tiles, lambda windows: network(windows)[:, None].float().sigmoid())
    return probability[0, 0].numpy()


def _mode(overlap: float) -> str:
    """MONAI's weights: those of `predict_volume` if tiles overlap, else the fastest."""
    return "gaussian" if overlap else "constant"


def bench_stitching(scale: Scale, repeats: int) -> list[dict]:
    """Prediction by the identity: tiles of 5 slices cut, weighted and put together again.

    Tiles, batch, threads and network are the same. For a centre-slice network, slices are either
    MONAI's batch, or the centres of its 3D windows, which vote on five slices each.
    """
    image = np.random.default_rng(0).random(scale.stitched, np.float32)
    truth = torch.from_numpy(image).sigmoid().numpy()
    centre, every = Identity("center"), Identity("all")
    peers = {
        "MONAI, slices as batch": ("centre slice", centre, monai_slices, centre, {}),
        "MONAI, windows at each slice": ("centre slice", centre, monai_windows, every, {"step": 1}),
        "MONAI, windows every 3 slices": ("all slices", every, monai_windows, every, {"step": 3}),
    }

    def error(probability: np.ndarray) -> float:
        return float(np.abs(probability - truth).max())

    def compare(a: np.ndarray, b: np.ndarray) -> str:
        return f"identity to {error(a):.0e}, theirs {error(b):.0e}"

    rows = []
    for overlap, target in ((0.0, 3), (0.25, 2)):
        for peer, (kind, ours, function, theirs, options) in peers.items():
            task = f"stitching, {size(scale.stitched)}, {kind}, overlap {overlap:.0%}"
            if not installed("monai"):
                rows.append(missing(task, peer))
                continue
            calls = (
                functools.partial(predict, ours, image, overlap, "cpu"),
                functools.partial(function, theirs, image, overlap, **options),
            )
            limits = {"target": target, "holds": lambda a, b: error(a) < 1e-6}
            rows.append(compete(task, calls[0], peer, calls[1], compare, repeats, **limits))
    return rows


def predict(network: nn.Module, image: np.ndarray, overlap: float, device: str, **options):
    """`predict_volume`, called in the same way as its peers."""
    options = {"overlap": overlap, "batch": BATCH, "device": device, "skip_empty": False} | options
    return inference.predict_volume(network, image, progress=False, **options)


def random_network(settings: NetworkSettings) -> Segmenter:
    """A network with random weights, for measuring speed."""
    torch.manual_seed(0)
    return Segmenter(settings).eval()


def bench_depth(scale: Scale, repeats: int) -> list[dict]:
    """Forward pass of the inflated network beside the 2D one: the paper's "no overhead"."""
    flat = replace(scale.network, depth=1)
    costs = [cost(settings)["network"] for settings in (scale.network, flat)]
    extra = [f"{deep / shallow - 1:+.2%}" for deep, shallow in zip(*costs, strict=True)]
    calls = []
    for settings in (scale.network, flat):
        network = random_network(settings)
        blocks = torch.rand(2, 1, settings.depth, settings.block, settings.block)
        calls.append(functools.partial(torch.inference_mode()(network), blocks))
    task = f"forward pass, {describe(scale.network)}, {scale.network.depth} slices"
    told = f"parameters {extra[0]}, FLOPs {extra[1]}"
    return [compete(task, calls[0], "the same, 1 slice", calls[1], lambda a, b: told, repeats)]


def describe(settings: NetworkSettings) -> str:
    """Encoder and size of a network."""
    return f"{settings.encoder.split('.')[0]} at {settings.size}"


def bench_skipping(scale: Scale, repeats: int) -> list[dict]:
    """Prediction of a sparse stack as `neurolib segment` does it, beside MONAI's sliding window.

    What skipping saves and loses on real stacks is in data/results/skipping.csv.
    """
    depth, *sides = scale.sparse
    tree = synthesis.grow(0, (depth, *(max(64, side // 3) for side in sides)))
    image = normalise(synthesis.render(tree, scale.sparse, "confocal", 0).data)
    mask = blocking.make_target(tree, scale.sparse)[1]
    network, tiling = random_network(scale.small_network), inference.Tiling()
    saved = skipping(image, mask, scale.small_network)
    task = f"prediction, {describe(scale.small_network)}, {size(scale.sparse)}"
    told = f"{saved.tiles:.0%} of tiles skipped, {saved.foreground:.1%} of the foreground lost"
    ours = functools.partial(predict, network, image, tiling.overlap, "cpu")
    peers = {"every tile run": ours}
    if installed("monai"):
        monai = functools.partial(monai_slices, network, image, tiling.overlap)
        peers["MONAI, slices as batch"] = monai
    skips = functools.partial(ours, skip_empty=True)
    return [
        compete(task, skips, peer, theirs, lambda a, b: told, repeats)
        for peer, theirs in peers.items()
    ]


# ---------------------------------------------------------------------------------------- GPU


def usable(scale: Scale) -> bool:
    """Whether to measure rates: on a GPU, or if the scale asks for the CPU."""
    return scale.device == "cpu" or torch.cuda.is_available()


def waits(function: Callable, device: str) -> Callable:
    """A call that returns when the device has finished."""

    def call() -> object:
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return call


def matrix_rate(scale: Scale) -> float:
    """FLOP/s of one large bfloat16 matrix product, the best of ten."""
    a, b = torch.randn(2, scale.matrix, scale.matrix, device=scale.device, dtype=torch.bfloat16)
    product = waits(lambda: a @ b, scale.device)
    product()
    return 2 * scale.matrix**3 / min(seconds(product) for _ in range(10))


def training_steps(scale: Scale, fast: bool) -> Callable[[], float]:
    """Some steps on one batch, from the same weights; the call returns the last loss.

    `fast`: bfloat16, compiled, channels last, fused AdamW, the batch on the device. Otherwise
    plain code: float32, nothing compiled or fused, the batch copied in every step.
    """
    device, options = scale.device, TrainingSettings(batch=scale.batch, loss="dice+ce+skeleton")
    network = random_network(scale.network).train().to(device)
    side, depth = scale.network.block, scale.network.depth
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(scale.batch, 1, depth, side, side, generator=generator)
    responses = (blocks[:, 0, depth // 2 : depth // 2 + 1] > 0.98).float()
    optimizer = torch.optim.AdamW(parameter_groups(network, options), fused=fast)
    run = network
    if fast:
        network.to(memory_format=torch.channels_last)
        blocks, responses = blocks.to(device), responses.to(device)
        # On a CPU this would need a compiler, and minutes.
        run = torch.compile(network) if device == "cuda" else network

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            logits = run(blocks.to(device))
        loss = sum(loss_terms(options.loss, logits.float(), responses.to(device), 0.1).values())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), options.clip)
        optimizer.step()
        return loss.detach()

    return waits(lambda: [step() for _ in range(scale.steps)][-1].item(), device)


def bench_training(scale: Scale, repeats: int) -> list[dict]:
    """Training steps on a GPU: bfloat16, compiled, channels last, fused AdamW, data on the device.

    The peer is the same step in plain code: eager, float32, the batch copied each time.
    """
    task = f"training, {describe(scale.network)}, batch {scale.batch}"
    peer = "eager float32"
    if not usable(scale):
        return [line(task, "blocks/s", "", peer, agreement=NO_GPU)]

    def compare(a: float, b: float) -> str:
        return f"loss after {scale.steps} steps {a:.3f}, theirs {b:.3f}"

    ours, theirs = (training_steps(scale, fast) for fast in (True, False))
    rate = {"work": scale.steps * scale.batch, "unit": "blocks/s"}
    row = compete(task, ours, peer, theirs, compare, repeats, **rate)
    peak = matrix_rate(scale)
    used = PASSES * cost(scale.network)["network"][1] * row["ours"]
    row["agreement"] += f"; {used / peak:.0%} of {peak / 1e12:.0f} TFLOP/s of a matrix product"
    return [row]


def bench_inference(scale: Scale, repeats: int) -> list[dict]:
    """Prediction on a GPU in bfloat16, tiles overlapping by a quarter."""
    task = f"prediction, {describe(scale.network)}, {size(scale.inferred)}"
    peer = "MONAI, slices as batch"
    if not usable(scale):
        return [line(task, "voxels/s", "", peer, agreement=NO_GPU)]
    if not installed("monai"):
        return [missing(task, peer)]
    image = np.random.default_rng(0).random(scale.inferred, np.float32)
    network = random_network(scale.network).to(scale.device)

    def cast(function: Callable) -> np.ndarray:
        with torch.autocast(scale.device, torch.bfloat16):
            return function(network, image, 0.25, scale.device)

    def compare(a: np.ndarray, b: np.ndarray) -> str:
        return f"probabilities within {np.abs(a - b).max():.0e}"

    ours, theirs = (functools.partial(cast, way) for way in (predict, monai_slices))
    rate = {"work": image.size, "unit": "voxels/s"}
    return [compete(task, ours, peer, theirs, compare, repeats, **rate)]
