"""Questions of notebook 02: folding colours, inflating a kernel, what averaging gains."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from neurolib.course.exercises import call, question, recognise
from neurolib.inflation import fold_rgb

WIDTH, PATCH = 6, 4  # of the random kernels, (WIDTH, channels, PATCH, PATCH)


@question("black or bright, a grey slice gives the tokens of the 2D model.")
def q1(fold: Callable) -> str:
    """Kernels (E, 3, p, p), their bias (E,), µ and σ (3,) give a grey kernel and its bias."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        weight, bias, slices = _random(draw, 3)
        mean, std = (0.2 + 0.5 * torch.rand(2, 3, generator=draw, dtype=weight.dtype)).unbind()
        answer = call(fold, weight.clone(), bias.clone(), mean.clone(), std.clone())
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            return "Return two things: the grey kernel and the bias."
        grey, shifted = (torch.as_tensor(part) for part in answer)
        if grey.shape != (WIDTH, 1, PATCH, PATCH):
            return (
                f"Expected one kernel for each of a token's numbers, {(WIDTH, 1, PATCH, PATCH)} as "
                f"(E, 1, p, p); yours is {tuple(grey.shape)}. Sum over axis 1 with keepdim=True."
            )
        if shifted.shape != (WIDTH,):
            return (
                f"One bias for each of a token's numbers, (E,) = ({WIDTH},), is expected; yours is "
                f"{tuple(shifted.shape)}. Sum over the colours and over the patch only."
            )
        per_channel = (part.view(1, 3, 1, 1) for part in (mean, std))
        if hint := _fold_hint(weight, bias, *per_channel, grey.to(weight), shifted.to(weight)):
            return hint
        of_colour = F.conv2d(
            (slices - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1), weight, bias, stride=PATCH
        )
        of_grey = F.conv2d(slices[:, :1], grey.to(weight), shifted.to(weight), stride=PATCH)
        if not _same(of_grey, of_colour):
            return "The tokens of a grey slice are not yet those of the 2D model."
    return ""


def _fold_hint(weight, bias, mean, std, grey, shifted) -> str:
    """A hint on a wrong grey kernel, or on a wrong bias; empty if both are right."""
    exact, exact_bias = fold_rgb(weight, bias, mean.flatten().tolist(), std.flatten().tolist())
    mistakes = [
        (weight, "The 2D model divides each channel by its σ: so must w'."),
        (weight * std, "The 2D model divides by σ; you multiply."),
        (weight / 3, "The outputs of the three channels add up: sum them, do not average."),
        (weight / std / 3, "σ is right, but the outputs of the channels add up: do not average."),
    ]
    if not _same(grey, exact):
        sums = ((terms.sum(1, keepdim=True), hint) for terms, hint in mistakes)
        remedy = "w' is not right yet: divide the kernel of each channel by its σ, then sum them."
        return recognise(grey, sums) or remedy
    shift = bias - exact_bias
    over_all = "In the bias, sum over channels and patch; do not average."
    mistakes = [
        (bias, "A black slice is not zero to the 2D model, which subtracts µ: b' is not b."),
        (bias + shift, "µ is subtracted from the slice: b' is b minus what µ/σ gives."),
        (bias - (weight * mean).sum((1, 2, 3)), "In the bias, too, divide by σ."),
        (bias - shift / PATCH**2, over_all),
        (bias - shift / weight[0].numel(), over_all),
        (bias - (mean / std).sum() * exact.sum((1, 2, 3)), "Each channel has a µ/σ of its own."),
        (bias - (mean * exact).sum((1, 2, 3)), "µ_c goes with w_c / σ_c, not with their sum w'."),
        (-shift, "What you subtract is right, too, but b itself is missing."),
    ]
    if _same(shifted, exact_bias):
        return ""
    if hint := recognise(shifted, mistakes):
        return f"w' is right. {hint}"
    return "w' is right, but b' is not yet: put g = 0 into (g - µ_c) / σ_c and see what w_c gives."


@question("any block gives the tokens of its middle slice.")
def q2(inflate: Callable) -> str:
    """Grey kernels (E, 1, p, p) and a depth D give (E, 1, D, p, p) by the center strategy."""
    draw = torch.Generator().manual_seed(2)
    for depth in (5, 1, 3, 7, 9):
        grey, _, _ = _random(draw, 1)
        kernel = torch.as_tensor(call(inflate, grey.clone(), depth)).to(grey)
        if kernel.shape != (WIDTH, 1, depth, PATCH, PATCH):
            return (
                f"Depth {depth}, kernels {tuple(grey.shape)}: expected (E, 1, D, p, p) = "
                f"{(WIDTH, 1, depth, PATCH, PATCH)}, got {tuple(kernel.shape)}."
            )
        block = torch.rand(2, 1, depth, 3 * PATCH, 3 * PATCH, generator=draw, dtype=grey.dtype)
        answer = F.conv3d(block, kernel, stride=(depth, PATCH, PATCH))[:, :, 0]
        if _same(answer, F.conv2d(block[:, :, depth // 2], grey, stride=PATCH)):
            continue
        shares = [_share(kernel[:, :, z], grey) for z in range(depth)]
        if None in shares:
            return f"Depth {depth}: one of your slices is not a multiple of the grey kernel."
        if np.allclose(shares, 1):
            return (
                f"Every slice has the whole kernel: {depth} equal slices give {depth} times the "
                "response of one. Put the kernel into the middle slice only."
            )
        if np.allclose(shares, 1 / depth):
            return "That is average: it looks at all slices. Here only the middle one counts."
        used = np.flatnonzero(np.abs(shares) > 1e-6)
        if len(used) == 1 and used[0] != depth // 2:
            return f"The kernel is in slice {used[0]} of {depth}, counted from 0: not the middle."
        if len(used) == 1:
            return (
                f"The right slice, but {shares[used[0]]:.3g} times the kernel: only the kernel "
                "itself gives the tokens of the 2D model."
            )
        return (
            f"Depth {depth}: your slices have the shares {np.round(shares, 2).tolist()} of the "
            f"kernel; expected 1 for slice {depth // 2} and 0 for the others."
        )
    return ""


@question("average gains if a neurite passes through more than √D slices; otherwise it loses.")
def q3(gain: Callable) -> str:
    """Depth D and a tube's number n of slices give signal to noise, relative to 2D."""
    for depth, inside in [(9, 4), (9, 9), (9, 1), (5, 2), (5, 5), (7, 3), (1, 1)]:
        answer, ratio = float(call(gain, depth, inside)), inside / depth
        if np.isclose(answer, inside / np.sqrt(depth), rtol=1e-3):
            continue
        root = np.sqrt(depth)
        mistakes = [
            (ratio, f"That is the signal. The noise shrinks, too, if you average {depth} slices."),
            (inside, "Independent noise does not average out like 1/D, but like 1/√D."),
            (root, "That holds for a tube in all slices; here it is in n of them."),
            (1 / root, "That holds for a tube in one slice; here it is in n of them."),
            (root / inside, "The signal is divided by the noise, not the noise by the signal."),
            (ratio / root, "Less noise makes the ratio larger: divide by 1/√D."),
            (np.sqrt(ratio), "The signal grows with n itself, not with its root."),
        ]
        if hint := recognise(answer, mistakes):
            return f"D = {depth}, n = {inside}: you gave {answer:.2f}. {hint}"
        return (
            f"D = {depth}, n = {inside}: {answer:.2f} is not right. How much is left of the "
            f"signal if {inside} of {depth} slices have it, and how much of the noise?"
        )
    return ""


def _random(
    draw: torch.Generator, channels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernels (E, channels, p, p), a bias (E,) and slices (2, 3, 4p, 4p) with equal channels."""
    weight = torch.randn(WIDTH, channels, PATCH, PATCH, generator=draw, dtype=torch.float64)
    bias = torch.randn(WIDTH, generator=draw, dtype=torch.float64)
    slices = torch.rand(2, 1, 4 * PATCH, 4 * PATCH, generator=draw, dtype=torch.float64)
    return weight, bias, slices.expand(-1, 3, -1, -1)


def _same(answer: torch.Tensor, expected: torch.Tensor) -> bool:
    # Wide enough for an answer computed in single precision.
    return torch.allclose(answer, expected, rtol=1e-4, atol=1e-4)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    """The factor between `whole` and `part`; None if there is none."""
    factor = float((part * whole).sum() / whole.square().sum())
    return factor if _same(part, factor * whole) else None
