"""Weight inflation: a patch embedding learnt on 2D colour images becomes one for 3D grey blocks.

The functions follow notebook 02: fold the colours, inflate along z, and do both to a whole state
dict, whose position embedding timm resizes. ``average`` and ``center`` come from Zhang et al. 2022
(TransSeg), as used by Cheng et al.; exact folding, ``gaussian`` and ``random`` are ours.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from neurolib._timm import timm
from neurolib.errors import SettingsError, WeightsError

STRATEGIES = ("average", "center", "gaussian", "random")
PATCH_WEIGHT, PATCH_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
POSITION = "pos_embed"

# Weights that fill a smaller share of the model's keys belong to another model.
REQUIRED_MATCH = 0.95


def fold_rgb(
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    fold: str = "exact",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold a colour patch embedding and its input normalisation into one for grey images.

    To show the 2D model a grey slice g in [0, 1], one repeats it in three channels and normalises
    these, (g - µ_c) / σ_c. The patch embedding is linear, so

        w' = Σ_c w_c / σ_c,     b' = b - Σ_c µ_c / σ_c Σ_uv w_c(u, v)

    give the same tokens from g itself.

    Parameters
    ----------
    weight : torch.Tensor, (E, 3, p, p)
    bias : torch.Tensor, (E,)
    mean, std : sequence of 3 floats
        Normalisation with which the encoder was trained.
    fold : {"exact", "sum"}
        ``sum`` adds the channels and ignores µ and σ, as TransSeg's code does.

    Returns
    -------
    weight : torch.Tensor, (E, 1, p, p)
    bias : torch.Tensor, (E,)
    """
    if weight.ndim != 4 or weight.shape[1] != len(mean) or len(mean) != len(std):
        raise SettingsError(
            f"fold_rgb: expected a weight (E, {len(mean)}, p, p), got {tuple(weight.shape)}"
        )
    if fold == "sum":
        return weight.sum(1, keepdim=True), bias.clone()
    if fold != "exact":
        raise SettingsError(f"fold={fold!r}: expected 'exact' or 'sum'")
    # In float64, because the bias is a difference of sums over 3·p² products.
    w = weight.double()
    mean, std = (w.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    folded = (w / std).sum(1, keepdim=True)
    shift = (w * mean / std).sum((1, 2, 3))
    return folded.to(weight.dtype), (bias.double() - shift).to(bias.dtype)


def slice_weights(depth: int, strategy: str) -> torch.Tensor:
    """Weights (depth,) by which `inflate` multiplies the kernel for each slice of a block.

    ``average``: 1/D each. ``center``: 1 for slice D // 2, else 0 (for an even depth, this is the
    slice after the middle). ``gaussian``: a normal curve around the centre with σ = D/4 and sum 1,
    which blurs less than ``average`` and more than ``center``.
    """
    z = torch.arange(depth, dtype=torch.float64)
    if strategy == "average":
        return torch.full_like(z, 1 / depth)
    if strategy == "center":
        return (z == depth // 2).double()
    if strategy == "gaussian":
        curve = torch.exp(-0.5 * ((z - depth // 2) / (depth / 4)) ** 2)
        return curve / curve.sum()
    raise SettingsError(f"strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}")


def inflate(
    weight: torch.Tensor, depth: int, strategy: str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Inflate a 2D kernel along z.

    Parameters
    ----------
    weight : torch.Tensor, (E, C, p, p)
    depth : int
        Number of slices D that become one plane of tokens.
    strategy : {"average", "center", "gaussian", "random"}
        How the 2D kernel is spread over the slices (see `slice_weights`). ``random`` does not use
        the 2D kernel but a truncated normal of timm's scale (σ = 0.02). It is the control that
        separates the patch embedding's contribution from that of the encoder behind it.
    generator : torch.Generator, optional
        Random numbers for ``random``.

    Returns
    -------
    torch.Tensor, (E, C, D, p, p)
        With ``average`` and ``gaussian`` the sum over D is `weight`, so a block of equal slices
        gives the tokens of the 2D model. With ``center`` any block gives the tokens of the 2D
        model for its centre slice.
    """
    if weight.ndim != 4:
        raise SettingsError(f"inflate: expected a weight (E, C, p, p), got {tuple(weight.shape)}")
    if depth < 1:
        raise SettingsError(f"depth={depth}: expected at least one slice")
    if strategy == "random":
        shape = (*weight.shape[:2], depth, *weight.shape[2:])
        values = torch.empty(shape, dtype=weight.dtype)
        return torch.nn.init.trunc_normal_(values, std=0.02, generator=generator)
    along_z = slice_weights(depth, strategy).to(weight)
    return weight[:, :, None] * along_z.view(1, 1, -1, 1, 1)


@dataclass(frozen=True)
class LoadReport:
    """Keys that `inflate_encoder` matched, and those that were missing, unexpected or misshapen."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the model's keys that the weights filled."""
        return len(self.matched) / (len(self.matched) + len(self.missing) + len(self.misshapen))

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.misshapen)
        lines = [f"{len(self.matched)} of {total} keys of the encoder matched ({self.share:.0%})"]
        for name in ("missing", "unexpected", "misshapen"):
            if keys := getattr(self, name):
                more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
                lines.append(f"{name}: {', '.join(keys[:4])}{more}")
        return "; ".join(lines)


def inflate_encoder(
    encoder: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    strategy: str,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator | None = None,
) -> LoadReport:
    """Put 2D weights into `encoder`, a timm ViT whose input channels are the D slices.

    A Conv3d over (1, D, H, W) whose kernel spans all D slices is a Conv2d over (D, H, W): both
    multiply and add the same numbers. So the encoder can be an unchanged timm model with
    ``in_chans=D``, which takes the inflated kernel (E, 1, D, p, p) as (E, D, p, p).

    Parameters
    ----------
    encoder : timm VisionTransformer
        Changed in place, or left as it is if the weights do not fit.
    weights : mapping of str to torch.Tensor
        2D state dict with timm's keys (`neurolib.weights.load_pretrained`), or with those of
        DINOv2's own files with registers.
    strategy, generator
        See `inflate`.
    mean, std : sequences of 3 floats
        The encoder's input normalisation.
    """
    target = encoder.state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    if PATCH_WEIGHT not in weights:
        raise WeightsError(f"the weights have no {PATCH_WEIGHT}; expected a timm ViT's state dict")
    # The kernel is held back, because timm would silently resize it to another patch size.
    kernel = weights.pop(PATCH_WEIGHT)
    if "register_tokens" in weights:
        weights.setdefault("mask_token", None)  # timm recognises DINOv2's own files by it
    # Positions that are not a square grid cannot be resized; the report below names them.
    with contextlib.suppress(RuntimeError):
        # timm renames DINOv2's registers and resizes the position embedding.
        weights = timm.models.vision_transformer.checkpoint_filter_fn(dict(weights), encoder)
    # CLIP's patch embedding has no bias; folding gives it one.
    bias = weights.get(PATCH_BIAS, kernel.new_zeros(len(kernel)))
    grey, weights[PATCH_BIAS] = fold_rgb(kernel, bias, mean, std)
    depth = target[PATCH_WEIGHT].shape[1]
    weights[PATCH_WEIGHT] = inflate(grey, depth, strategy, generator)[:, 0]
    fits = {k: v for k, v in weights.items() if k in target and v.shape == target[k].shape}
    report = LoadReport(
        matched=tuple(fits),
        missing=tuple(k for k in target if k not in weights),
        unexpected=tuple(k for k in weights if k not in target),
        misshapen=tuple(k for k in weights if k in target and k not in fits),
    )
    # Only a few of 174 keys, but without them the encoder does not see what it was trained on.
    embeddings = {PATCH_WEIGHT, PATCH_BIAS, POSITION} & target.keys() <= fits.keys()
    if report.share < REQUIRED_MATCH or not embeddings:
        raise WeightsError(
            f"weights of another architecture: {report}; expected at least {REQUIRED_MATCH:.0%}, "
            "including the patch and position embedding"
        )
    encoder.load_state_dict({**target, **fits})
    return report


def tube_response(
    kernels: Mapping[str, torch.Tensor], size: int, radius: float = 4.0
) -> dict[str, list[float]]:
    """How strongly the tokens respond to a bright tube in one slice of an empty block.

    `size` (rows and columns of the block) and `radius` (σ of the horizontal tube) are in pixels of
    the encoder; the default is 1.8 voxels, enlarged 2.24 times. Each of the kernels
    (E, 1, D, p, p) gives D norms, one per slice in which the tube lies, relative to the largest of
    all kernels.
    """
    rows = torch.arange(size) - size / 2
    tube = torch.exp(-0.5 * (rows / radius) ** 2)[None, None, :, None].expand(1, 1, size, size)
    norms = {
        name: [
            F.conv2d(tube, kernel[:, :, z], stride=kernel.shape[-1]).norm().item()
            for z in range(kernel.shape[2])
        ]
        for name, kernel in kernels.items()
    }
    top = max(max(values) for values in norms.values())
    return {name: [value / top for value in values] for name, values in norms.items()}
