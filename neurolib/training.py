"""Training: batches of blocks, losses, and a loop that can be read from top to bottom.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from neurolib.blocking import (
    Sample,
    block_grid,
    choose_blocks,
    distance_of,
    read_block,
    response_at,
    salient,
)
from neurolib.devices import pick_device, pick_precision
from neurolib.errors import DataError, SettingsError, WeightsError
from neurolib.files import atomic_path, checkpoint_file, claim, content_key, sha256
from neurolib.network import NetworkSettings, Segmenter, build, make, settings_of

# Response of a voxel at most one voxel off the centreline: the dilated skeleton of the target.
SKELETON = float(response_at(np.ones(())))

LOSSES = ("dice+focal", "dice+ce", "dice+ce+skeleton", "dice+ce+cldice")
# Modules that a training's result depends on.
CODE = ("training", "network", "inflation", "blocking")
# What a checkpoint records so that `build` can recreate a frozen encoder, in its argument order.
REBUILD = ("initialisation", "weights_file", "network_seed", "fold")
# The initialisation that a network reports if its encoder came from a checkpoint.
RESTORED = "checkpoint"
# Finer towards 1, where a network trained for recall puts its doubtful voxels.
THRESHOLDS = (*(i / 20 for i in range(1, 20)), 0.97, 0.98, 0.99)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training run; rates are per step of AdamW."""

    steps: int = 1000
    batch: int = 8  # blocks per pass
    accumulate: int = 1  # passes per step: its gradient is the mean of theirs
    encoder_rate: float = 1e-4
    decoder_rate: float = 1e-3
    layer_decay: float = 0.75  # rate of each encoder layer relative to the one above it
    weight_decay: float = 0.05  # on matrices only
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0  # norm of the gradient
    average: float = 0.98  # decay of the running average of the weights that is kept (EMA)
    loss: str = "dice+ce+skeleton"
    frozen: bool = False  # train the decoder (and stem) only
    negatives: float = 0.25  # blocks without foreground per salient block
    augment: bool = True
    checkpointing: bool = False  # recompute the encoder's activations: a third slower, less memory
    validate_every: int = 50  # steps
    patience: int = 0  # stop after so many validations without improvement; 0: never
    validation_blocks: int = 32  # per validation volume, half of them salient
    save_every: int = 25  # steps between resume files
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self):
        if min(self.steps, self.batch, self.accumulate) < 1 or self.patience < 0:
            raise SettingsError(
                f"steps={self.steps}, batch={self.batch}, accumulate={self.accumulate}, patience="
                f"{self.patience}: expected at least one of each, patience 0 for none"
            )
        if min(self.validate_every, self.validation_blocks, self.save_every) < 1:
            raise SettingsError(
                f"validate_every={self.validate_every}, validation_blocks="
                f"{self.validation_blocks}, save_every={self.save_every}: expected at least 1"
            )
        if not (0 < self.encoder_rate < math.inf and 0 < self.decoder_rate < math.inf):
            raise SettingsError(
                f"encoder_rate={self.encoder_rate}, decoder_rate={self.decoder_rate}: expected "
                "positive rates; frozen=True leaves the encoder as it is"
            )
        if not (0 <= self.average < 1 and 0 <= self.warmup <= 1):
            raise SettingsError(
                f"average={self.average}, warmup={self.warmup}: expected shares from 0 to 1"
            )
        if not 0 <= self.negatives < math.inf:
            raise SettingsError(
                f"negatives={self.negatives}: expected a number of blocks without foreground per "
                "salient one, 0 for none"
            )
        if self.loss not in LOSSES:
            raise SettingsError(f"loss={self.loss!r}: expected one of {', '.join(LOSSES)}")


# ---------------------------------------------------------------------------------- batches


class BlockSource:
    """Training blocks of several volumes, drawn by step number.

    Parameters
    ----------
    samples : sequence of Sample
    depth, size : int
        A block is (depth, size, size).
    negatives : float
        Blocks without foreground per salient block, or fewer if there are not as many.
    stride : int
        In y and x; in z every slice is the centre of a block.

    Raises
    ------
    DataError
        If no block of any sample is salient.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        depth: int = 5,
        size: int = 100,
        negatives: float = 0.25,
        stride: int = 50,
        seed: int = 0,
    ):
        self.samples = samples
        self.shape = (depth, size, size)
        self.seed = seed
        places = []
        for number, sample in enumerate(samples):
            grid = block_grid(sample.image.shape, self.shape, (1, stride, stride))
            chosen = choose_blocks(sample.mask, grid, negatives, seed, block=self.shape)
            places.append(np.column_stack([np.full(len(chosen), number), grid[chosen]]))
        self.places = np.concatenate(places) if places else np.empty((0, 4), int)
        self._epoch, self._order = -1, np.empty(0, int)  # the newest epoch, and its order
        if not len(self.places):
            names = ", ".join(s.pair.name for s in samples) or "none"
            raise DataError(
                f"no salient block in the training volumes ({names}); expected foreground in at "
                "least 0.1 % of some block's centre slice: check the SWC files and their frame"
            )

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and responses of one step, each (count, 1 or depth..., size, size) float32.

        An epoch visits every place once, in an order drawn from the seed and the epoch.
        """
        rows = [self._row(step * count + i) for i in range(count)]
        return read_places(self.samples, self.places[rows], self.shape)

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self.places))
        if self._epoch != epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.places))
            self._epoch = epoch
        return int(self._order[place])


def read_places(
    samples: Sequence[Sample], places: np.ndarray, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the blocks at `places`, rows of (number of the sample, z, y, x).

    Returns
    -------
    blocks : torch.Tensor, (n, 1, depth, rows, columns)
    responses : torch.Tensor, (n, depth, rows, columns)
    """
    blocks = [read_block(samples[i].image, np.array(at), shape) for i, *at in places]
    responses = [read_block(samples[i].response, np.array(at), shape) for i, *at in places]
    return torch.from_numpy(np.stack(blocks)[:, None]), torch.from_numpy(np.stack(responses))


def augment(
    blocks: torch.Tensor, responses: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random variants of blocks that a microscope could have recorded.

    Flips, quarter turns and zoom (0.8 to 1.25) in the plane, z reversed; gamma (0.7 to 1.5),
    noise (σ up to 0.05), one slice blanked in one block of ten. The geometry moves block and
    response alike.

    Parameters
    ----------
    blocks : torch.Tensor, (n, 1, D, h, w)
        Values in [0, 1].
    responses : torch.Tensor, (n, D, h, w)
    generator : torch.Generator
        On the CPU; the only source of randomness.
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
            block = block.clone()
            block[others[int(draw(0, len(others)))]] = 0
        out_blocks.append(block)
        out_responses.append(response)
    return torch.stack(out_blocks)[:, None], torch.stack(out_responses)


def zoom(
    block: torch.Tensor, response: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale a block and its target (D, h, w) about their centre, in the plane.

    The neurite grows with the image, but the target's tube around the centreline must not. So the
    response is converted to distances, scaled, and converted back. Borders are reflected.
    """
    theta = torch.tensor([[[1 / factor, 0, 0], [0, 1 / factor, 0]]]).expand(2, -1, -1)
    both = torch.stack([block, torch.from_numpy(distance_of(response.numpy()))])
    grid = F.affine_grid(theta, list(both.shape), align_corners=False)
    block, distance = F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)
    # A response of 0 lies at a distance of 5 or more: what shrinking would make of it is not known.
    known = distance < distance_of(0.0) - 1e-3
    zoomed = torch.from_numpy(response_at((distance * factor).numpy())).clamp_min(0)
    return block, zoomed * known


# ----------------------------------------------------------------------------------- losses


def soft_dice(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - Dice of the probabilities over the whole batch (Milletari et al. 2016, not squared).

    Over the batch and not per block: a block without foreground has no Dice of its own.
    """
    p = logits.sigmoid()
    return 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)


def focal(logits: torch.Tensor, mask: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p_true)^γ, mean over voxels."""
    ce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return (ce * (1 - torch.exp(-ce)) ** gamma).mean()


def skeleton_recall(logits: torch.Tensor, skeleton: torch.Tensor) -> torch.Tensor:
    """1 - the share of the dilated skeleton that is found (Kirchhoff et al. 2024)."""
    p = logits.sigmoid()
    return 1 - ((p * skeleton).sum() + 1) / (skeleton.sum() + 1)


def soft_skeleton(p: torch.Tensor, iterations: int = 3) -> torch.Tensor:
    """Skeleton of images (n, slices, h, w) by repeated soft opening (Shit et al. 2021, Alg. 1).

    Parameters
    ----------
    p : torch.Tensor, (n, slices, h, w)
        Values in [0, 1]; each slice is an image of its own.
    iterations : int
        At least the radius of the thickest neurite in voxels; the target's tubes have 1.9.
    """

    def erode(image: torch.Tensor) -> torch.Tensor:
        rows = -F.max_pool2d(-image, (3, 1), 1, (1, 0))
        return torch.minimum(rows, -F.max_pool2d(-image, (1, 3), 1, (0, 1)))

    def opened(image: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(erode(image), 3, 1, 1)

    skeleton = F.relu(p - opened(p))
    for _ in range(iterations):
        p = erode(p)
        rest = F.relu(p - opened(p))
        skeleton = skeleton + F.relu(rest - skeleton * rest)
    return skeleton


def soft_cldice(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - clDice of the probabilities over the whole batch (Shit et al. 2021, eq. 3)."""
    p = logits.sigmoid()
    found, wanted = soft_skeleton(p), soft_skeleton(mask)
    precision = ((found * mask).sum() + 1) / (found.sum() + 1)
    recall = ((wanted * p).sum() + 1) / (wanted.sum() + 1)
    return 1 - 2 * precision * recall / (precision + recall)


def loss_terms(
    name: str, logits: torch.Tensor, response: torch.Tensor, tau: float
) -> dict[str, torch.Tensor]:
    """The terms whose sum is the loss `name`.

    Parameters
    ----------
    name : {"dice+focal", "dice+ce+skeleton", "dice+ce+cldice"}
        The first is the usual pair of the field, for comparability; the second is our default; the
        third has clDice in place of skeleton recall.
    logits, response : torch.Tensor, (n, slices, h, w)
        `response` is the target before its threshold.
    tau : float
        Threshold that makes the mask.
    """
    mask = (response >= tau).to(logits.dtype)
    terms = {"dice": soft_dice(logits, mask)}
    if name == "dice+focal":
        terms["focal"] = focal(logits, mask)
    else:
        terms["ce"] = F.binary_cross_entropy_with_logits(logits, mask)
    if name == "dice+ce+skeleton":
        skeleton = (response >= max(SKELETON, tau)).to(logits.dtype)  # inside the mask
        terms["skeleton"] = skeleton_recall(logits, skeleton)
    if name == "dice+ce+cldice":
        terms["cldice"] = soft_cldice(logits, mask)
    return terms


def pulls(logits: torch.Tensor, response: torch.Tensor, tau: float) -> dict[str, torch.Tensor]:
    """What each term of the loss asks of each voxel: minus its gradient with respect to the logits.

    Parameters are those of `loss_terms`. Positive: the logit should rise.
    """
    found = {}
    for name in LOSSES:
        leaf = logits.detach().requires_grad_()
        for term, value in loss_terms(name, leaf, response, tau).items():
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
            found[term] = -gradient
    return found


# ------------------------------------------------------------------------------------- loop


def start(device: str = "auto", precision: str = "auto", devices: int = 0) -> Fabric:
    """Start Lightning Fabric on a device, or as one of the processes that torchrun has started.

    Parameters
    ----------
    device : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` ... or ``mps``.
    precision : str
        ``auto``, ``32-true`` or ``bf16-mixed``, see `neurolib.devices.pick_precision`.
    devices : int
        GPUs (or CPU processes) of this machine; 0: as many as torchrun has started, or one.

    Raises
    ------
    SettingsError
        If there is no such device.
    """
    here, nodes = 1, 1
    # Fabric's own launcher sets WORLD_SIZE too, but not this one.
    if "LOCAL_WORLD_SIZE" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // here
    try:
        where = pick_device(device)
        precision = pick_precision(precision, where.type)
        # A GPU named by its number is used as such; on a CPU there is no choice.
        chosen = [where.index] if where.index is not None and where.type == "cuda" else here
        options = {"devices": devices or chosen, "num_nodes": nodes, "precision": precision}
        fabric = Fabric(accelerator=where.type, **options)
    except Exception as error:  # Fabric raises its own classes, and plain ones
        reason = str(error).splitlines()[0][:120]
        raise SettingsError(
            f"device={device!r}, precision={precision!r}: not usable here ({reason}); try "
            "device='cpu', precision='32-true'"
        ) from None
    fabric.launch()
    return fabric


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves: best validation Dice, its step and threshold, history, checkpoint."""

    dice: float
    step: int
    threshold: float
    history: list[dict]
    checkpoint: Path


def layer_rates(network: Segmenter, settings: TrainingSettings) -> list[float]:
    """Peak rate of each layer of the encoder, from the pixels up; none without an encoder.

    Layer 0 is the patch embedding with the position embedding, layer i + 1 is transformer block
    i, and the last one is the norm behind them, at the encoder's full rate: each layer has
    `layer_decay` times the rate of the one above it (Clark et al. 2020; Bao et al. 2022).
    """
    if network.encoder is None:
        return []
    top = len(network.encoder.blocks) + 1
    return [settings.encoder_rate * settings.layer_decay ** (top - i) for i in range(top + 1)]


def parameter_groups(network: Segmenter, settings: TrainingSettings) -> list[dict]:
    """AdamW groups: the encoder has the rates of `layer_rates`; only matrices decay.

    Position embedding, class and register tokens are tables of vectors, not matrices: they do
    not decay.
    """
    rates = layer_rates(network, settings)
    tables = ("encoder.pos_embed", "encoder.cls_token", "encoder.reg_token")
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = settings.decoder_rate
        if name.startswith("encoder."):
            layer = 0
            if name.startswith("encoder.blocks."):
                layer = int(name.split(".")[2]) + 1
            elif name.startswith("encoder.norm."):
                layer = -1
            rate = rates[layer]
        decay = settings.weight_decay if parameter.ndim > 1 and name not in tables else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def schedule(step: int, settings: TrainingSettings) -> float:
    """Share of the peak rate at a step, the first being 0: linear warm-up, half a cosine to 1 %."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, settings.steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    network: Segmenter,
    samples: Sequence[Sample],
    validation: Sequence[Sample],
    folder: str | Path,
    settings: TrainingSettings,
    tau: float = 0.1,
    fabric: Fabric | None = None,
    on_step: Callable[[dict], None] | None = None,
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

    Returns
    -------
    TrainingResult

    Raises
    ------
    DataError
        If no training block is salient.
    SettingsError
        If the loss stops being finite, the device runs out of memory, or another process trains
        in this folder.
    """
    folder = Path(folder)
    fabric = fabric or start(precision=settings.precision)
    # Only rank 0 writes.
    alone = claim(folder / ".training.lock") if fabric.is_global_zero else contextlib.nullcontext()
    with alone:
        return _train(network, samples, validation, folder, settings, tau, fabric, on_step)


def _train(
    network: Segmenter,
    samples: Sequence[Sample],
    validation: Sequence[Sample],
    folder: Path,
    settings: TrainingSettings,
    tau: float,
    fabric: Fabric,
    on_step: Callable[[dict], None] | None,
) -> TrainingResult:
    """The loop; see `train`."""
    shape = network.settings
    if not validation:
        raise DataError("no validation volume; hold out at least one neuron for validation")
    seen = {content_key(s.image): s.pair.name for s in (*samples, *validation)}
    blocks = BlockSource(samples, shape.depth, shape.block, settings.negatives, seed=settings.seed)
    checks = [validation_blocks(s, shape, settings) for s in validation]
    _prepare_encoder(network, settings)
    optimizer = torch.optim.AdamW(parameter_groups(network, settings), fused=True)
    module, optimizer = fabric.setup(network, optimizer)
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    identity = _identity(network, settings, tau, blocks, checks)
    state = _Resume(folder, network, optimizer, average, identity)
    step, history, best = state.load()
    if step == 0 and fabric.is_global_zero:
        state.save(step, history, best)  # once stopped, it has other weights

    bar = tqdm(
        range(step, step if _out_of_patience(history, best, settings) else settings.steps),
        initial=step,
        total=settings.steps,
        desc="training",
        mininterval=2,
    )
    for step in bar:
        share = schedule(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.zero_grad()
        with _explain_memory(settings, shape.size):
            terms = _gradient(module, network, fabric, blocks, step, settings, tau)
        norm = fabric.clip_gradients(
            module, optimizer, max_norm=settings.clip, error_if_nonfinite=False
        )
        loss = sum(terms.values())
        # A finite loss can have a gradient that is not, and one such step ruins all weights.
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            kept = f"{folder / 'checkpoint.safetensors'} holds the weights of step {best['step']}"
            raise SettingsError(
                f"the loss is {loss:g}, its gradient {norm.item():g} in step {step + 1}; "
                f"{kept if best['step'] else 'no weights were kept'}; lower the rates "
                f"({settings.encoder_rate}, {settings.decoder_rate})"
            )
        with _explain_memory(settings, shape.size):  # the first step creates the moments
            optimizer.step()
        # A short run must forget its first steps, so the decay grows from 1/11 to its final value.
        decay = min(settings.average, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            average[key].lerp_(value.detach().to(average[key].dtype), 1 - decay)
        row = {"step": step + 1, "loss": loss} | terms
        last = step + 1 == settings.steps
        if last or (step + 1) % settings.validate_every == 0:
            with fabric.autocast():
                dice, threshold = validate(network, average, checks, tau)
            row |= {"validation_dice": dice, "threshold": threshold}
            if dice > best["dice"] or best["step"] == 0:
                best = {"dice": dice, "step": step + 1, "threshold": threshold}
                if fabric.is_global_zero:
                    save_checkpoint(
                        folder / "checkpoint.safetensors",
                        network,
                        average,
                        best | {"tau": tau, "training": asdict(settings), "seen": seen},
                    )
        history.append(row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", dice=f"{best['dice']:.3f}", refresh=False)
        if on_step:
            on_step(row)
        last = last or _out_of_patience(history, best, settings)
        if fabric.is_global_zero and (last or (step + 1) % settings.save_every == 0):
            state.save(step + 1, history, best)
        if last:
            break
    if fabric.is_global_zero:
        _write_history(folder / "history.csv", history)
    fabric.barrier()
    restore(network, folder / "checkpoint.safetensors")
    return TrainingResult(
        best["dice"], best["step"], best["threshold"], history, folder / "checkpoint.safetensors"
    )


@contextlib.contextmanager
def _explain_memory(settings: TrainingSettings, size: int) -> Iterator[None]:
    """Turn running out of memory, on a GPU or not, into an error that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # GPUs have an error class for it; torch's allocator of main memory does not.
        words = "not enough memory", "can't allocate memory"
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(text in str(error) for text in words):
            raise
        raise SettingsError(
            f"out of memory at batch={settings.batch}, size={size}; lower one of them "
            f"(accumulate={2 * settings.accumulate} with half the batch gives nearly the same "
            "step), or set checkpointing=True"
        ) from None


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
        # Nothing reads the last norm, which comes after the last tap: with several processes,
        # all would wait for its gradient.
        parameter.requires_grad_(not (settings.frozen or name.startswith("norm.")))
    network.encoder.set_grad_checkpointing(settings.checkpointing)


def device_name(fabric: Fabric) -> str:
    """The name of the GPU on which a training runs, or ``CPU``."""
    on_card = fabric.device.type == "cuda"
    return torch.cuda.get_device_name(fabric.device) if on_card else fabric.device.type.upper()


def _gradient(
    module,
    network: Segmenter,
    fabric: Fabric,
    blocks: BlockSource,
    step: int,
    settings: TrainingSettings,
    tau: float,
) -> dict[str, float]:
    """Add up the gradients of one step's passes; return the mean of each term of the loss."""
    means: dict[str, float] = {}
    for number in range(settings.accumulate):
        last = number + 1 == settings.accumulate
        # Index in the single sequence of batches that all passes of all processes share.
        place = (step * settings.accumulate + number) * fabric.world_size + fabric.global_rank
        block, response = blocks.batch(place, settings.batch)
        if settings.augment:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + place)
            block, response = augment(block, response, generator)
        block, response = fabric.to_device((block, response))
        # Processes exchange their gradients once a step, not once a pass.
        with fabric.no_backward_sync(module, enabled=not last):
            logits = module(block)
            terms = loss_terms(settings.loss, logits, _wanted(response, network), tau)
            fabric.backward(sum(terms.values()) / settings.accumulate)
        for key, value in terms.items():
            means[key] = means.get(key, 0.0) + value.item() / settings.accumulate
    return means


def _out_of_patience(history: list[dict], best: dict, settings: TrainingSettings) -> bool:
    """Whether none of the last `patience` validations beat the best one before them."""
    later = [row for row in history if "validation_dice" in row and row["step"] > best["step"]]
    return bool(settings.patience) and best["step"] > 0 and len(later) >= settings.patience


def _wanted(response: torch.Tensor, network: Segmenter) -> torch.Tensor:
    """The slices of the response (n, D, h, w) that the network predicts."""
    if network.settings.predict == "all":
        return response
    middle = response.shape[1] // 2
    return response[:, middle : middle + 1]


@dataclass(frozen=True)
class Check:
    """Validation blocks of one volume; weight (n,): how many blocks of the volume each stands for.

    blocks (n, 1, D, h, w), responses (n, D, h, w).
    """

    blocks: torch.Tensor
    responses: torch.Tensor
    weight: torch.Tensor


def validation_blocks(sample: Sample, shape: NetworkSettings, settings: TrainingSettings) -> Check:
    """Blocks from which the Dice of a whole volume can be estimated without predicting it.

    Half of them are salient, half are not, each evenly chosen along the grid that tiles the
    volume. Most blocks of a volume are empty, and false positives in them count in the Dice; so
    each chosen block is weighted by the number of blocks of its kind that it represents.
    """
    block = (shape.depth, shape.block, shape.block)
    grid = block_grid(sample.image.shape, block, (1, shape.block, shape.block))
    full = np.flatnonzero(salient(sample.mask, grid, block=block))
    empty = np.setdiff1d(np.arange(len(grid)), full)
    kinds = [
        (rows, _evenly(rows, max(1, settings.validation_blocks // 2))) for rows in (full, empty)
    ]
    weight = [np.full(len(some), len(rows) / max(1, len(some))) for rows, some in kinds]
    chosen = np.concatenate([some for _, some in kinds])
    places = np.column_stack([np.zeros(len(chosen), int), grid[chosen]])
    return Check(
        *read_places([sample], places, block), torch.from_numpy(np.concatenate(weight)).float()
    )


def _evenly(rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]


@torch.no_grad()
def validate(
    network: Segmenter,
    weights: dict[str, torch.Tensor],
    checks: Sequence[Check],
    tau: float,
    batch: int = 2,
) -> tuple[float, float]:
    """Mean over the validation volumes of their estimated Dice, and its best threshold.

    Parameters
    ----------
    network : Segmenter
        Runs with `weights` (the running average) and keeps its own.
    weights : dict
        State dict to validate.
    checks : sequence of Check
        One per volume.
    tau : float
        Threshold of the target.
    batch : int
        Blocks per forward pass; few enough that validation needs no more memory than a step.

    Returns
    -------
    dice : float
        At the threshold of `THRESHOLDS` where the mean is highest; one for all volumes.
    threshold : float
    """
    if not checks:
        raise DataError("no validation volume; hold out at least one neuron for validation")
    device = next(network.parameters()).device
    scores = []
    for check in checks:
        probability = []
        for first in range(0, len(check.blocks), batch):
            piece = check.blocks[first : first + batch].to(device)
            logits = torch.func.functional_call(network, weights, (piece,))
            probability.append(logits.float().sigmoid().cpu())
        found = torch.cat(probability)
        mask = _wanted(check.responses, network) >= tau
        # One number per block, then the sum over all blocks that it represents.
        wanted = check.weight @ mask.flatten(1).sum(1).float()
        row = []
        for threshold in THRESHOLDS:
            guess = found >= threshold
            both = check.weight @ (guess & mask).flatten(1).sum(1).float()
            total = check.weight @ guess.flatten(1).sum(1).float() + wanted
            row.append(2 * both.item() / max(1.0, total.item()))
        scores.append(row)
    mean = np.mean(scores, axis=0)
    return float(mean.max()), THRESHOLDS[int(mean.argmax())]


# ------------------------------------------------------------------------------ checkpoints


def save_checkpoint(
    path: str | Path, network: Segmenter, weights: dict[str, torch.Tensor], facts: dict
) -> None:
    """Write weights and everything needed to rebuild the network as safetensors, atomically.

    A frozen encoder is left out: it can be recreated from the pre-trained weights, and the file is
    much smaller. An encoder that came from a checkpoint cannot be recreated, and is stored.
    """
    facts = facts | {"initialisation": network.initialisation}
    if facts["training"]["frozen"] and network.initialisation != RESTORED:
        facts |= {
            "weights_file": network.weights_file,
            "network_seed": network.seed,
            "fold": network.fold,
            "encoder_sum": encoder_sum(network),
        }
        weights = {k: v for k, v in weights.items() if not k.startswith("encoder.")}
    header = {"network": json.dumps(settings_of(network)), "facts": json.dumps(facts)}
    weights = {k: v.contiguous().cpu() for k, v in weights.items()}
    header["sha256"] = _seal(weights, header)
    with atomic_path(path) as temporary:
        save_file(weights, temporary, header)


def _seal(weights: dict[str, torch.Tensor], header: dict[str, str]) -> str:
    """SHA-256 over everything in a checkpoint, since a disk may corrupt a byte of it."""
    digest = hashlib.sha256((header.get("network", "") + header.get("facts", "")).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_checkpoint(path: str | Path) -> tuple[Segmenter, dict]:
    """Rebuild the network of a checkpoint.

    Returns
    -------
    network : Segmenter
        In evaluation mode, on the CPU.
    facts : dict
        ``dice``, ``step``, ``threshold``, ``tau`` and ``training`` settings, as saved.

    Raises
    ------
    WeightsError
        If the file is missing, truncated, or not a checkpoint of this package.
    """
    path = checkpoint_file(path)
    header = _read_header(path)
    try:
        settings = NetworkSettings(**json.loads(header["network"]))
        facts = json.loads(header["facts"])
        frozen = facts["training"]["frozen"] and "encoder_sum" in facts
        how = [facts[key] for key in REBUILD] if frozen else []
    except (KeyError, TypeError, ValueError):
        raise WeightsError(
            f"{path}: no checkpoint of this package; expected one that notebook 03 or "
            "`neurolib run` wrote"
        ) from None
    network = build(settings, *how)[0] if frozen else make(settings)
    if frozen and encoder_sum(network) != facts["encoder_sum"]:
        raise WeightsError(
            f"{path}: trained on a frozen encoder with other pre-trained weights than those "
            "found here; put the same weights file in place"
        )
    restore(network, path)
    return network.eval(), facts


def check_unseen(facts: dict, samples: Sequence[Sample], checkpoint: str | Path) -> None:
    """Refuse to test a checkpoint on a volume that it was trained on or that chose its threshold.

    Parameters
    ----------
    facts : dict
        Of `load_checkpoint`.
    samples : sequence of Sample
        To be tested; recognised by their intensities, whatever their names are.
    checkpoint : path
        For the message.

    Raises
    ------
    DataError
        If the checkpoint has seen one of them.
    """
    for sample in samples:
        name = facts.get("seen", {}).get(content_key(sample.image))
        if name:
            raise DataError(
                f"{checkpoint}: was trained or validated on {name}, so a test on "
                f"{sample.pair.name} would say nothing; run notebook 03 with these neurons held "
                "out, or test on others"
            )


def encoder_sum(network: Segmenter) -> str:
    """A number, as text, that distinguishes one encoder's weights from another's."""
    total = sum(p.detach().cpu().double().abs().sum().item() for p in network.encoder.parameters())
    return f"{total:.9e}"


def restore(network: Segmenter, path: str | Path) -> None:
    """Load a checkpoint's weights into a network of the same settings.

    Raises
    ------
    WeightsError
        If the file is not a checkpoint, or belongs to another network.
    """
    path = checkpoint_file(path)
    header = _read_header(path)
    try:
        facts = json.loads(header.get("facts", "{}"))
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable checkpoint ({error})") from None
    if "sha256" in header and header["sha256"] != _seal(weights, header):
        raise WeightsError(
            f"{path}: damaged, its content is not what was saved; copy it again, or train again"
        )
    without_encoder = "encoder_sum" in facts
    if without_encoder:
        if encoder_sum(network) != facts["encoder_sum"]:
            raise WeightsError(
                f"{path}: trained on a frozen encoder with other weights than this network's; "
                f"expected initialisation {facts['initialisation']!r} and the same weights file"
            )
        kept = network.state_dict()
        weights |= {k: v for k, v in kept.items() if k.startswith("encoder.")}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise WeightsError(f"{path}: weights of another network ({reason})") from None
    if not without_encoder:
        network.initialisation = RESTORED


def _read_header(path: str | Path) -> dict:
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such checkpoint; train first, or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable checkpoint ({error})") from None


def _identity(
    network: Segmenter,
    settings: TrainingSettings,
    tau: float,
    blocks: BlockSource,
    checks: Sequence[Check],
) -> str:
    """What must be equal to resume a run: settings, data, first weights, code.

    A network that has already been in this training no longer has its first weights; its object
    remembers them.
    """
    facts = {
        "network": settings_of(network),
        "training": asdict(settings),
        "tau": tau,
        "neurons": [sample.pair.name for sample in blocks.samples],
        "places": content_key(blocks.places),
        "samples": [content_key(s.image, s.response) for s in blocks.samples],
        "validation": [content_key(c.responses.numpy(), c.blocks.numpy()) for c in checks],
        "code": [sha256(Path(__file__).with_name(f"{name}.py")) for name in CODE],
    }
    given = json.dumps(facts, sort_keys=True)
    if network.training_begun is None or network.training_begun[0] != given:
        first = float(sum(p.detach().cpu().double().abs().sum() for p in network.parameters()))
        network.training_begun = given, f"{first:.9e}"
    return json.dumps(network.training_begun)


class _Resume:
    """The full state of a run in one safetensors file: weights, their average, both moments."""

    def __init__(self, folder: Path, network, optimizer, average: dict, identity: str):
        self.path = folder / "resume.safetensors"
        self.network, self.optimizer, self.average = network, optimizer, average
        self.identity = identity

    def load(self) -> tuple[int, list[dict], dict]:
        """Step to resume at, history so far, best validation so far."""
        start = (0, [], {"dice": 0.0, "step": 0, "threshold": 0.5})
        if not self.path.exists():
            return start
        header = _read_header(self.path)
        if header.get("identity") != self.identity:
            return start
        tensors = load_file(self.path)
        self.network.load_state_dict(_under("network.", tensors))
        for key, value in _under("average.", tensors).items():
            self.average[key].copy_(value)
        moments: dict[int, dict] = {}
        for key, value in _under("optimizer.", tensors).items():
            number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        progress = json.loads(header["progress"])
        return progress["step"], progress["history"], progress["best"]

    def save(self, step: int, history: list[dict], best: dict) -> None:
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for number, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": v for name, v in entry.items()}
        progress = json.dumps({"step": step, "history": history, "best": best})
        header = {"identity": self.identity, "progress": progress}
        with atomic_path(self.path) as temporary:
            save_file(
                {k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, header
            )


def _under(prefix: str, tensors: dict) -> dict:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _write_history(path: Path, history: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in history for key in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
