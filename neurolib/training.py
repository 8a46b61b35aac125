"""Training: blocks, augmentation, losses, and a loop that can be read from top to bottom.

You can kill a run at any moment, and it resumes to the same weights: the blocks and the
augmentation of step k depend only on the seed and on k, and the resume file holds everything else
that the loop carries (weights, moments of the optimiser, running average).
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from neurolib.blocking import (
    Sample,
    Shape,
    block_grid,
    choose_blocks,
    distance_of,
    read_block,
    response_at,
    salient,
)
from neurolib.devices import pick_device, pick_precision
from neurolib.errors import DataError, SettingsError, WeightsError
from neurolib.files import CHECKPOINT, atomic_path, checkpoint_file, claim, content_key, sha256
from neurolib.network import NetworkSettings, Segmenter, build, make
from neurolib.parameters import check_range
from neurolib.weights import StateDict, save_weights

# Voxels with at least this response form the target's dilated skeleton: they lie at most one voxel
# off the centreline.
SKELETON = float(response_at(np.ones(())))
STRIDE = 50  # between training blocks in y and x; in z every slice is the centre of a block

LOSSES = ("dice+focal", "dice+ce", "dice+ce+skeleton", "dice+ce+cldice")
# Modules on which the result of a training run depends.
CODE = ("training", "network", "inflation", "blocking")
# The initialisation that a network reports if its encoder came from a checkpoint.
RESTORED = "checkpoint"
# Finer towards 1, where a network trained for recall puts its doubtful voxels.
THRESHOLDS = (*(i / 20 for i in range(1, 20)), 0.97, 0.98, 0.99)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training run, by default those of notebook 03; rates are per step."""

    steps: int = 200
    batch: int = 4  # blocks per pass
    accumulate: int = 1  # passes per step, whose gradients are averaged
    encoder_rate: float = 1e-4
    decoder_rate: float = 1e-3
    layer_decay: float = 0.75  # rate of each encoder layer relative to the one above it
    weight_decay: float = 0.05  # on matrices only
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0  # norm of the gradient
    average: float = 0.98  # decay of the running average of the weights (EMA), which is saved
    loss: str = "dice+focal"
    frozen: bool = True  # train the decoder (and stem) only
    negatives: float = 1.0  # other blocks, with little or no foreground, per salient block
    augment: bool = True
    checkpointing: bool = False  # recompute the encoder's activations: a third slower, less memory
    validate_every: int = 25  # steps
    patience: int = 0  # validations without improvement before training stops; 0: no limit
    validation_blocks: int = 32  # per validation volume, half of them salient
    save_every: int = 25  # steps between resume files
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self):
        for name, value in asdict(self).items():
            check_range(name, value)
        if self.loss not in LOSSES:
            raise SettingsError(f"loss={self.loss!r}: expected one of {', '.join(LOSSES)}")


# ---------------------------------------------------------------------------------- batches

Batch = tuple[torch.Tensor, torch.Tensor]  # blocks and their responses


class BlockSource:
    """Training blocks (depth, size, size) of samples, drawn by step number.

    For each salient block there are `negatives` other blocks, or fewer if the
    volumes do not have that many.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        depth: int = 5,
        size: int = 100,
        negatives: float = TrainingSettings.negatives,
        seed: int = 0,
    ):
        self.samples, self.shape, self.seed = samples, (depth, size, size), seed
        places = [np.empty((0, 4), int)]
        for number, sample in enumerate(samples):
            grid = block_grid(sample.image.shape, self.shape, (1, STRIDE, STRIDE))
            chosen = choose_blocks(sample.mask, grid, negatives, seed, block=self.shape)
            places.append(np.insert(grid[chosen], 0, number, axis=1))
        self.places = np.concatenate(places)
        self._epoch, self._order = -1, np.empty(0, int)  # the latest epoch, and its order
        if not len(self.places):
            names = ", ".join(s.pair.name for s in samples) or "none"
            raise DataError(
                f"no salient block in the training volumes ({names}); expected foreground in at "
                "least 0.1 % of some block's centre slice: check the SWC files and their frame"
            )

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, step: int, count: int) -> Batch:
        """Blocks (count, 1, depth, size, size) and responses (count, depth, size, size) of a step.

        An epoch visits every place once, in an order drawn from the seed and the epoch.
        """
        rows = [self._row(step * count + i) for i in range(count)]
        return _read_places(self.samples, self.places[rows], self.shape)

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self.places))
        if self._epoch != epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.places))
            self._epoch = epoch
        return int(self._order[place])


def _read_places(samples: Sequence[Sample], places: np.ndarray, shape: Shape) -> Batch:
    """Blocks and responses at `places`, rows of (number of the sample, z, y, x)."""
    blocks = [read_block(samples[i].image, np.array(at), shape) for i, *at in places]
    responses = [read_block(samples[i].response, np.array(at), shape) for i, *at in places]
    return torch.from_numpy(np.stack(blocks)[:, None]), torch.from_numpy(np.stack(responses))


def augment(blocks: torch.Tensor, responses: torch.Tensor, generator: torch.Generator) -> Batch:
    """Random variants of blocks that a microscope could have recorded.

    Flips, quarter turns and zoom (0.8 to 1.25) in the plane, z reversed; gamma (0.7 to 1.5),
    noise (σ up to 0.05), one slice blanked in one block out of ten. Flips, turns and zoom
    move block and response alike.

    Blocks (n, 1, D, h, w) are in [0, 1], responses (n, D, h, w); `generator`, on the CPU, is the
    only source of randomness.
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    out_blocks, out_responses = [], []
    for block, response in zip(blocks[:, 0], responses, strict=True):
        both = torch.stack([block, response])
        flips = [dim for dim in (1, 2, 3) if draw(0, 1) < 0.5]
        block, response = torch.rot90(both.flip(flips), int(draw(0, 4)), (2, 3))
        if draw(0, 1) < 0.3:
            block, response = zoom(block, response, draw(0.8, 1.25))
        block = block.clamp(0, 1) ** draw(0.7, 1.5)
        noise = torch.randn(block.shape, generator=generator)
        block = (block + draw(0, 0.05) * noise).clamp(0, 1)
        # The centre slice carries the target of predict="center": it is never blanked.
        if draw(0, 1) < 0.1 and len(block) > 1:
            others = [z for z in range(len(block)) if z != len(block) // 2]
            block[others[int(draw(0, len(others)))]] = 0
        out_blocks.append(block)
        out_responses.append(response)
    return torch.stack(out_blocks)[:, None], torch.stack(out_responses)


def zoom(block: torch.Tensor, response: torch.Tensor, factor: float) -> Batch:
    """Scale a block and its target (D, h, w) about their centre, in the plane.

    The neurite grows with the image, but the target's tube around the centreline must not. So the
    response is converted to distances, scaled, and converted back. Borders are reflected.
    Only the part of a distance that lies in the plane is scaled; its slope there tells how large
    that part is.
    """
    theta = torch.tensor([[[1 / factor, 0, 0], [0, 1 / factor, 0]]]).expand(2, -1, -1)
    both = torch.stack([block, torch.from_numpy(distance_of(response.numpy()))])
    grid = F.affine_grid(theta, list(both.shape), align_corners=False)
    block, distance = F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)
    # A response of 0 means a distance of 5 or more; where shrinking would move it is unknown.
    known = distance < distance_of(0.0) - 1e-3
    slope = sum(d**2 for d in torch.gradient(distance * factor, dim=(1, 2))).clamp(max=1)
    distance = distance * (1 + (factor**2 - 1) * slope).sqrt()
    zoomed = torch.from_numpy(response_at(distance.numpy())).clamp_min(0)
    return block, zoomed * known


# ----------------------------------------------------------------------------------- losses


def soft_dice(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - Dice of the probabilities over the whole batch (Milletari et al. 2016, not squared).

    Not per block, because the Dice of a block without foreground is undefined.
    """
    p = logits.sigmoid()
    return 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)


def focal(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p_true)², mean over voxels."""
    ce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return (ce * (1 - torch.exp(-ce)) ** 2.0).mean()


def skeleton_recall(logits: torch.Tensor, skeleton: torch.Tensor) -> torch.Tensor:
    """1 - the share of the dilated skeleton that is found (Kirchhoff et al. 2024)."""
    return 1 - ((logits.sigmoid() * skeleton).sum() + 1) / (skeleton.sum() + 1)


def soft_skeleton(p: torch.Tensor) -> torch.Tensor:
    """Skeleton of images (n, slices, h, w) by repeated soft opening (Shit et al. 2021, Alg. 1).

    Values are in [0, 1]; each slice is treated as a separate image.
    """

    def erode(image: torch.Tensor) -> torch.Tensor:
        rows = -F.max_pool2d(-image, (3, 1), 1, (1, 0))
        return torch.minimum(rows, -F.max_pool2d(-image, (1, 3), 1, (0, 1)))

    def opened(image: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(erode(image), 3, 1, 1)

    skeleton = F.relu(p - opened(p))
    for _ in range(3):  # at least the radius of the thickest neurite; the target's tubes have 1.9
        p = erode(p)
        rest = F.relu(p - opened(p))
        skeleton = skeleton + F.relu(rest - skeleton * rest)
    return skeleton


def soft_cldice(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - clDice of the probabilities over the whole batch (Shit et al. 2021, eq. 3)."""
    p = logits.sigmoid()
    ours, true = soft_skeleton(p), soft_skeleton(mask)
    precision = ((ours * mask).sum() + 1) / (ours.sum() + 1)
    recall = ((true * p).sum() + 1) / (true.sum() + 1)
    return 1 - 2 * precision * recall / (precision + recall)


def loss_terms(
    name: str, logits: torch.Tensor, response: torch.Tensor, tau: float
) -> dict[str, torch.Tensor]:
    """The terms whose sum is the loss `name`, one of `LOSSES`; dice+focal is usual in the field.

    `logits` are (n, slices, h, w), and so is `response`, the target before its threshold `tau`.
    Where the response is NaN, the target is unknown: these voxels count as correct background.
    """
    logits = logits.masked_fill(response.isnan(), -30.0)
    mask = (response >= tau).to(logits.dtype)
    skeleton = (response >= max(SKELETON, tau)).to(logits.dtype)  # inside the mask
    terms = {
        "dice": lambda: soft_dice(logits, mask),
        "focal": lambda: focal(logits, mask),
        "ce": lambda: F.binary_cross_entropy_with_logits(logits, mask),
        "skeleton": lambda: skeleton_recall(logits, skeleton),
        "cldice": lambda: soft_cldice(logits, mask),
    }
    return {term: terms[term]() for term in name.split("+")}


def pulls(logits: torch.Tensor, response: torch.Tensor, tau: float) -> dict[str, torch.Tensor]:
    """How each term of the losses pulls on each logit: minus its gradient.

    Parameters are those of `loss_terms`. Where a value is positive, the logit should rise.
    """
    leaf = logits.detach().requires_grad_()
    terms = loss_terms("dice+focal+ce+skeleton+cldice", leaf, response, tau)
    return {
        term: -torch.autograd.grad(value, leaf, retain_graph=True)[0]
        for term, value in terms.items()
    }


# ------------------------------------------------------------------------------------- loop


def start_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Start Lightning Fabric on a device, or as one of the processes that torchrun has started.

    `device` and `precision` are those of `neurolib.devices`: ``auto`` uses the best there is.
    """
    chosen = pick_device(device)
    # torchrun sets both variables; without it, one process trains.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = int(os.environ.get("WORLD_SIZE", processes)) // processes
    numbered = chosen.type == "cuda" and chosen.index is not None  # as in cuda:1
    fabric = Fabric(
        accelerator=chosen.type,
        devices=[chosen.index] if numbered else processes,
        num_nodes=nodes,
        precision=pick_precision(precision, chosen.type),
    )
    fabric.launch()
    return fabric


def device_name(fabric: Fabric) -> str:
    """The GPU on which a training runs, or ``CPU``, and the precision, as ``CPU, bf16-mixed``."""
    on_gpu = fabric.device.type == "cuda"
    name = torch.cuda.get_device_name(fabric.device) if on_gpu else fabric.device.type.upper()
    return f"{name}, {fabric.strategy.precision.precision}"


def layer_rates(network: Segmenter, settings: TrainingSettings) -> list[float]:
    """Peak rate of each layer of the encoder, from the pixels up; none without an encoder.

    Layer 0 is the patch embedding with the position embedding, and layer i + 1 is transformer
    block i. The last layer, a norm that is not used here, has the full rate; each other layer has
    `layer_decay` times the rate of the one above it (Clark et al. 2020; Bao et al. 2022).
    """
    if network.encoder is None:
        return []
    top = len(network.encoder.blocks) + 1
    return [settings.encoder_rate * settings.layer_decay ** (top - i) for i in range(top + 1)]


def parameter_groups(network: Segmenter, settings: TrainingSettings) -> list[dict]:
    """AdamW groups: the encoder has the rates of `layer_rates`; only matrices decay.

    The position embedding and the class and register tokens are tables of vectors, not matrices,
    so they do not decay.
    """
    rates = layer_rates(network, settings)
    tables = ("encoder.pos_embed", "encoder.cls_token", "encoder.reg_token")
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = settings.decoder_rate
        if name.startswith("encoder.blocks."):
            rate = rates[int(name.split(".")[2]) + 1]
        elif name.startswith("encoder."):
            rate = rates[-1 if name.startswith("encoder.norm.") else 0]
        decay = settings.weight_decay if parameter.ndim > 1 and name not in tables else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def schedule(step: int, settings: TrainingSettings) -> float:
    """Share of the peak rate at a step (from 0): linear warm-up, then half a cosine to 1 %."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, settings.steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


class TrainingResult(NamedTuple):
    """What a run leaves behind: best validation Dice and its step, history, checkpoint."""

    dice: float
    step: int
    history: list[dict]
    checkpoint: Path


def train(
    network: Segmenter,
    samples: Sequence[Sample],
    validation: Sequence[Sample],
    folder: str | Path,
    settings: TrainingSettings,
    tau: float = 0.1,
    fabric: Fabric | None = None,
    on_step: Callable[[dict], None] = lambda row: None,
) -> TrainingResult:
    """Train a network; resume where a killed run with the same settings stopped.

    Parameters
    ----------
    network : Segmenter
        Initialised; its weights change in place and end as the best checkpoint's. To continue from
        a checkpoint with other data or settings, `restore` it first.
    samples, validation : sequences of Sample
    folder : path
        Receives ``checkpoint.safetensors`` (the best running average so far),
        ``history.csv``, and while training ``resume.safetensors``.
    settings : TrainingSettings
    tau : float
        Threshold of the target.
    fabric : lightning_fabric.Fabric, optional
        Device, precision and number of processes; by default one process on the best device.
    on_step : function, optional
        Called with the newest row of the history.
    """
    if not validation:
        raise DataError("no validation volume; hold out at least one neuron for validation")
    shape, checkpoint = network.settings, Path(folder) / CHECKPOINT
    fabric = fabric or start_fabric(precision=settings.precision)
    writes = fabric.is_global_zero  # only rank 0 writes
    alone = claim(checkpoint.with_name(".training.lock")) if writes else contextlib.nullcontext()
    with alone, _explain_memory(settings, network):
        blocks = BlockSource(samples, shape.depth, shape.block, settings.negatives, settings.seed)
        checks = [validation_blocks(sample, shape, settings) for sample in validation]
        about = {"tau": tau, "target": validation[0].kind, "training": asdict(settings)}
        # A network that continues from a checkpoint has seen what that one had.
        about["seen"] = network.origin.get("seen", {}) | names_by_content((*samples, *validation))
        _prepare_encoder(network, settings)
        optimizer = torch.optim.AdamW(parameter_groups(network, settings), fused=True)
        module, optimizer = fabric.setup(network, optimizer)
        average = {k: v.detach().clone() for k, v in network.state_dict().items()}
        resume = checkpoint.with_name("resume.safetensors")
        state = resume, _identity(network, about, samples, validation), network, optimizer, average
        history, best = _load_state(*state)
        todo = range(len(history), settings.steps)
        bar = tqdm(todo, "training", settings.steps, initial=len(history), mininterval=2)
        for step in bar:
            if 0 < settings.patience <= sum("threshold" in row for row in history[best["step"] :]):
                break
            if writes and step % settings.save_every == 0:
                _save_state(*state, history, best)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, settings)
            optimizer.zero_grad()
            terms = _gradient(fabric, module, blocks, step, settings, shape.predict, tau)
            options = {"max_norm": settings.clip, "error_if_nonfinite": False}
            norm = fabric.clip_gradients(module, optimizer, **options).item()
            loss = sum(terms.values())
            # The gradient of a finite loss can be infinite, and one such step ruins all weights.
            if not math.isfinite(loss + norm):
                raise SettingsError(
                    f"step {step + 1}: the loss is {loss:g} and its gradient {norm:g}; lower the "
                    f"rates ({settings.encoder_rate}, {settings.decoder_rate}); best step kept in "
                    f"{checkpoint}: {best['step'] or 'none'}"
                )
            optimizer.step()
            # A short run must forget its first steps, so the decay grows from 1/10 to its setting.
            decay = min(settings.average, (1 + step) / (10 + step))
            for key, value in network.state_dict().items():
                average[key].lerp_(value.detach().to(average[key].dtype), 1 - decay)
            row = {"step": step + 1, "loss": loss} | terms
            if step + 1 == settings.steps or (step + 1) % settings.validate_every == 0:
                with fabric.autocast():
                    dice, threshold = validate(network, average, checks, tau)
                row |= {"validation_dice": dice, "threshold": threshold}
                if dice > best["dice"] or best["step"] == 0:
                    best = {"dice": dice, "step": step + 1, "threshold": threshold}
                    if writes:
                        save_checkpoint(checkpoint, network, average, best | about)
            history.append(row)
            bar.set_postfix(loss=f"{loss:.3f}", dice=f"{best['dice']:.3f}", refresh=False)
            on_step(row)
        if writes:
            _save_state(*state, history, best)
            _write_history(checkpoint.with_name("history.csv"), history)
        fabric.barrier()
    restore(network, checkpoint)
    return TrainingResult(best["dice"], best["step"], history, checkpoint)


def _gradient(
    fabric: Fabric, module, blocks: BlockSource, step: int, settings, predict: str, tau: float
) -> dict[str, float]:
    """Add up the gradients of one step's passes; return the mean of each term of the loss."""
    means: dict[str, float] = {}
    for number in range(settings.accumulate):
        # Index in the single sequence of batches that all passes of all processes share.
        place = (step * settings.accumulate + number) * fabric.world_size + fabric.global_rank
        block, response = blocks.batch(place, settings.batch)
        if settings.augment:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + place)
            block, response = augment(block, response, generator)
        block, response = fabric.to_device((block, response))
        # Processes exchange their gradients once a step, not once a pass.
        with fabric.no_backward_sync(module, enabled=number + 1 < settings.accumulate):
            terms = loss_terms(settings.loss, module(block), _predicted(response, predict), tau)
            fabric.backward(sum(terms.values()) / settings.accumulate)
        for key, value in terms.items():
            means[key] = means.get(key, 0.0) + value.item() / settings.accumulate
    return means


def _predicted(response: torch.Tensor, predict: str) -> torch.Tensor:
    """The slices of the response (n, D, h, w) that a network predicts."""
    middle = response.shape[1] // 2
    return response if predict == "all" else response[:, middle : middle + 1]


@contextlib.contextmanager
def _explain_memory(settings: TrainingSettings, network: Segmenter) -> Iterator[None]:
    """Turn running out of memory, on a GPU or not, into an error that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # GPUs have an error class for it; torch's allocator of main memory does not.
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not re.search("not enough memory|can't allocate memory", str(error)):
            raise
        remedies = []
        if settings.batch > 1:
            remedies.append(
                f"lower batch={settings.batch} (with half of it and "
                f"accumulate={2 * settings.accumulate}, a step is nearly the same)"
            )
        if network.encoder is not None:
            remedies.append(f"lower size={network.settings.size}")
            # In a frozen encoder, nothing is kept for the backward pass.
            if not (settings.frozen or settings.checkpointing):
                remedies.append("set checkpointing=True")
        told = ", or ".join(remedies) or "close other programs, or use another device"
        raise SettingsError(f"out of memory; {told}") from None


def _prepare_encoder(network: Segmenter, settings: TrainingSettings) -> None:
    """Set which of the encoder's weights are trained, and what it keeps for the backward pass."""
    if network.encoder is None:
        if settings.frozen or settings.checkpointing:
            raise SettingsError(
                f"frozen={settings.frozen}, checkpointing={settings.checkpointing}: expected False "
                f"for {network.settings.encoder}, which has no transformer"
            )
        return
    for name, parameter in network.encoder.named_parameters():
        # The last norm comes after the last tap, so nothing reads it, and several processes would
        # wait for its gradient.
        parameter.requires_grad_(not (settings.frozen or name.startswith("norm.")))
    network.encoder.set_grad_checkpointing(settings.checkpointing)


# ------------------------------------------------------------------------------- validation


class ValidationBlocks(NamedTuple):
    """Some blocks of one volume; weight (n,): how many of its blocks each of them represents."""

    blocks: torch.Tensor  # (n, 1, D, h, w)
    responses: torch.Tensor  # (n, D, h, w)
    weight: torch.Tensor


def validation_blocks(
    sample: Sample, shape: NetworkSettings, settings: TrainingSettings
) -> ValidationBlocks:
    """Blocks from which the Dice of a whole volume can be estimated without predicting it.

    Half of them are salient and half are not, both chosen evenly along the grid that tiles the
    volume. Most blocks of a volume are empty, and false positives in them count in the Dice, so
    each chosen block is weighted by the number of blocks of its kind that it represents.
    """
    block = (shape.depth, shape.block, shape.block)
    grid = block_grid(sample.image.shape, block, (1, shape.block, shape.block))
    full = salient(sample.mask, grid, block=block)
    places, weight = [], []
    for rows in (np.flatnonzero(full), np.flatnonzero(~full)):
        count = min(len(rows), max(1, settings.validation_blocks // 2))
        places.append(grid[rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]])
        weight.append(np.full(count, len(rows) / max(1, count)))
    places = np.insert(np.concatenate(places), 0, 0, axis=1)
    weight = torch.from_numpy(np.concatenate(weight)).float()
    return ValidationBlocks(*_read_places([sample], places, block), weight)


@torch.no_grad()
def validate(
    network: Segmenter, weights: StateDict, checks: Sequence[ValidationBlocks], tau: float
) -> tuple[float, float]:
    """The volumes' mean estimated Dice at its best threshold, and that threshold.

    `THRESHOLDS` are tried; `tau` is the threshold of the target. The network runs with the state
    dict `weights` (the running average) and keeps its own weights.
    """
    device = next(network.parameters()).device
    scores = []
    for blocks, responses, weight in checks:
        # Two at a time, so that validation needs no more memory than a step.
        logits = [
            torch.func.functional_call(network, weights, (pair.to(device),)).float().cpu()
            for pair in blocks.split(2)
        ]
        probability = torch.cat(logits).sigmoid()
        mask = _predicted(responses, network.settings.predict) >= tau
        # Sum over each block, then over all blocks that it represents; not by `@`, which autocast
        # would round to the eight bits of bfloat16.
        wanted = (weight * mask.flatten(1).sum(1)).sum()
        row = []
        for threshold in THRESHOLDS:
            guess = probability >= threshold
            both = (weight * (guess & mask).flatten(1).sum(1)).sum()
            total = (weight * guess.flatten(1).sum(1)).sum() + wanted
            row.append(2 * both.item() / max(1.0, total.item()))
        scores.append(row)
    mean = np.mean(scores, axis=0)
    return float(mean.max()), THRESHOLDS[int(mean.argmax())]


# ------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: str | Path, network: Segmenter, weights: StateDict, facts: dict) -> None:
    """Write weights and everything needed to rebuild the network as safetensors, atomically.

    A frozen encoder is left out, which makes the file much smaller: it can be recreated from the
    pre-trained weights. An encoder that came from a checkpoint cannot be, so it is stored.
    """
    facts = facts | {"initialisation": network.origin["initialisation"]}
    if facts["training"]["frozen"] and facts["initialisation"] != RESTORED:
        facts = network.origin | facts | {"encoder_sum": weight_sum(network.encoder)}
        weights = {k: v for k, v in weights.items() if not k.startswith("encoder.")}
    header = {"network": json.dumps(asdict(network.settings)), "facts": json.dumps(facts)}
    save_weights(path, weights, **header, sha256=_seal(weights, header))


def _seal(weights: StateDict, header: dict[str, str]) -> str:
    """SHA-256 of everything in a checkpoint, because a disk may corrupt a byte of it."""
    digest = hashlib.sha256((header.get("network", "") + header.get("facts", "")).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weight_sum(module: torch.nn.Module) -> str:
    """A number, as text, that distinguishes one module's weights from another's."""
    total = sum(p.detach().cpu().double().abs().sum().item() for p in module.parameters())
    return f"{total:.9e}"


def load_checkpoint(path: str | Path) -> tuple[Segmenter, dict]:
    """Rebuild the network of a checkpoint, in evaluation mode, on the CPU.

    The second value holds ``dice``, ``step``, ``threshold``, ``tau`` and ``training`` settings.
    """
    header, weights = _read(path)
    try:
        settings = NetworkSettings(**json.loads(header["network"]))
        facts = json.loads(header["facts"])
        frozen = facts["training"]["frozen"] and "encoder_sum" in facts
        # The arguments with which `build` recreates a frozen encoder.
        keys = ("initialisation", "weights_file", "network_seed") if frozen else ()
        origin = [facts[key] for key in keys]
    except (KeyError, TypeError, ValueError):
        raise WeightsError(
            f"{path}: not a checkpoint of this package; expected one written by notebook 03 or "
            "`neurolib run`"
        ) from None
    network = build(settings, *origin)[0] if origin else make(settings)
    _fill(network, path, facts, weights)
    return network.eval(), facts


def restore(network: Segmenter, path: str | Path) -> None:
    """Load a checkpoint's weights into a network of the same settings."""
    check_start(path, network.settings, network.origin["initialisation"])
    header, weights = _read(path)
    _fill(network, path, json.loads(header.get("facts", "{}")), weights)


def check_start(path: str | Path, settings: NetworkSettings, initialisation: str) -> None:
    """Refuse (WeightsError) to continue from a checkpoint of a network with other settings."""
    header = _read(path)[0]
    facts = json.loads(header.get("facts", "{}"))
    theirs = json.loads(header.get("network", "{}")) | {"initialisation": initialisation}
    if "encoder_sum" in facts:  # the file does not hold its encoder, which both must share
        theirs["initialisation"] = facts["initialisation"]
    ours = asdict(settings) | {"initialisation": initialisation}
    if other := [name for name in ours if theirs.get(name, ours[name]) != ours[name]]:
        told = [", ".join(f"{name}={side[name]}" for name in other) for side in (theirs, ours)]
        raise WeightsError(
            f"start_from={path}: has {told[0]}, but this network has {told[1]}; make them equal, "
            "or give start_from= to begin without it"
        )


def _read(path: str | Path) -> tuple[dict[str, str], StateDict]:
    """Header and tensors of a checkpoint, or of the one in the folder of a run."""
    path = checkpoint_file(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; train first, or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable checkpoint ({error})") from None
    if "sha256" in header and header["sha256"] != _seal(weights, header):
        raise WeightsError(f"{path}: damaged, not what was saved; copy it again, or train again")
    return header, weights


def _fill(network: Segmenter, path: str | Path, facts: dict, weights: dict) -> None:
    """Load a checkpoint's weights into a network, which keeps its encoder if the file has none."""
    frozen = "encoder_sum" in facts
    if frozen and weight_sum(network.encoder) != facts["encoder_sum"]:
        raise WeightsError(
            f"{path}: trained on a frozen encoder with other weights than this network's; "
            f"expected initialisation {facts['initialisation']!r} and the same weights file"
        )
    if frozen:
        weights |= {f"encoder.{k}": v for k, v in network.encoder.state_dict().items()}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise WeightsError(f"{path}: weights of another network ({reason})") from None
    network.origin["seen"] = facts.get("seen", {})
    if not frozen:
        network.origin["initialisation"] = RESTORED


def names_by_content(samples: Sequence[Sample]) -> dict[str, str]:
    """The names of samples by the hashes of their images, as stored in a checkpoint."""
    return {content_key(sample.image): sample.pair.name for sample in samples}


def check_unseen(facts: dict, samples: Sequence[Sample], checkpoint: str | Path) -> None:
    """Refuse to test a checkpoint on a volume that it was trained on or that chose its threshold.

    Samples are recognised by their intensities, whatever their names are; `facts` are those of
    `load_checkpoint`.
    """
    known = facts.get("seen", {}) | facts.get("chosen_on", {})
    for sample in samples:
        name = known.get(content_key(sample.image))
        if name:
            raise DataError(
                f"{checkpoint}: was trained or validated on {name}, so a test on "
                f"{sample.pair.name} would be meaningless; run notebook 03 with these neurons held "
                "out, or test on others"
            )


# ----------------------------------------------------------------------------------- resume


def _identity(
    network: Segmenter, about: dict, samples: Sequence[Sample], validation: Sequence[Sample]
) -> str:
    """What must be equal to resume a run: settings, data, code, and initial weights.

    A network that has already begun this training no longer has its initial weights, so the
    object remembers their sum.
    """
    targets = [[content_key(s.response) for s in part] for part in (samples, validation)]
    code = [sha256(Path(__file__).with_name(f"{name}.py")) for name in CODE]
    given = json.dumps([asdict(network.settings), about, targets, code])
    if network.training_begun[0] != given:
        network.training_begun = given, weight_sum(network)
    return json.dumps(network.training_begun)


def _save_state(
    path: Path, identity: str, network, optimizer, average: dict, history: list[dict], best: dict
) -> None:
    """Write everything that the loop carries to one file: weights, their average, both moments."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": v for name, v in entry.items()}
    progress = {"history": json.dumps(history), "best": json.dumps(best)}
    save_weights(path, tensors, identity=identity, **progress)


def _load_state(
    path: Path, identity: str, network, optimizer, average: dict
) -> tuple[list[dict], dict]:
    """Restore what `_save_state` wrote in the same training; return history and best so far."""
    header, tensors = _read(path) if path.exists() else ({}, {})
    if header.get("identity") != identity:
        return [], {"dice": 0.0, "step": 0, "threshold": 0.5}
    weights = network.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        if part == "optimizer":
            number, name = name.split(".")
            parameter = parameters[int(number)]
            optimizer.state[parameter][name] = value.to(parameter.device)
        else:
            (weights if part == "network" else average)[name].copy_(value)
    return json.loads(header["history"]), json.loads(header["best"])


def _write_history(path: Path, history: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in history for key in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
