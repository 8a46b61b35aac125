"""Questions of notebook 03: resumable randomness, soft Dice, rates by layer and by step."""

import math
from collections.abc import Callable

import numpy as np
import torch

from neurolib.course.exercises import call, question, recognise

FLOOR = 0.01  # of the peak rate, at the end of the schedule


@question("step k draws the same numbers, whatever was drawn before.")
def q1(draw: Callable) -> str:
    """A seed and a step give the step's random numbers."""
    whole = [_numbers(draw, 0, step) for step in range(6)]
    if any(np.array_equal(whole[0], other) for other in whole[1:]):
        return "Every step draws the same numbers: seed the generator with the step, too."
    resumed = [_numbers(draw, 0, step) for step in range(3, 6)]
    if not all(map(np.array_equal, whole[3:], resumed)):
        return (
            "A run that resumes at step 3 draws different numbers there than a run that was never "
            "stopped: make a new generator for every step, from seed and step."
        )
    if np.array_equal(whole[1], _numbers(draw, 1, 1)):
        return "Another seed must draw different numbers."
    for steps in range(1, 6):
        if np.array_equal(whole[steps], _numbers(draw, steps, 0)):
            return (
                f"Seed 0 at step {steps} draws the same as seed {steps} at step 0: the second run "
                "repeats most of the first. Give both numbers side by side, [seed, step]."
            )
    return ""


def _numbers(draw: Callable, seed: int, step: int) -> np.ndarray:
    return np.array(call(draw, seed, step), float)  # a copy, in case the reader reuses an array


@question("it has a value for every batch, and a gradient to follow.")
def q2(soft_dice: Callable) -> str:
    """Probabilities and masks (n, 1, h, w) give 1 - Dice of the batch, with 1 added twice."""
    draw = torch.Generator().manual_seed(1)
    p = 0.05 + 0.9 * torch.rand(3, 1, 8, 8, generator=draw, dtype=torch.float64)
    y = (torch.rand(p.shape, generator=draw) < 0.2).to(p)
    # One block of several is empty, then all are.
    for mask in (y, y * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1), torch.zeros_like(y)):
        leaf = p.clone().requires_grad_()
        answer = torch.as_tensor(call(soft_dice, leaf, mask.clone()))
        if answer.numel() != 1:
            return f"One number per batch is expected; yours has the shape {tuple(answer.shape)}."
        exact = _dice(p, mask, p * mask, 1.0, 1.0)
        if not torch.isclose(answer.detach().to(exact), exact, rtol=1e-5):
            return _dice_hint(answer.item(), p, mask)
        if not answer.requires_grad or torch.autograd.grad(answer, leaf)[0].abs().sum() == 0:
            return "The value is right, but it has no gradient: stay in torch, without float()."
    return ""


def _dice(p, mask, both, above: float, below: float) -> torch.Tensor:
    return 1 - (2 * both.sum() + above) / (p.sum() + mask.sum() + below)


def _dice_hint(answer: float, p: torch.Tensor, mask: torch.Tensor) -> str:
    """A hint on a wrong soft Dice loss."""
    both, hard = p * mask, (p >= 0.5).to(p)
    axes = (1, 2, 3)
    per_block = (2 * both.sum(axes) + 1) / (p.sum(axes) + mask.sum(axes) + 1)
    mistakes = [
        (_dice(p, mask, both, 0, 0), "Without the ones, a batch of background teaches nothing."),
        (_dice(p, mask, both, 1, 0), "Add 1 below the line, too: a perfect answer must give 0."),
        (_dice(p, mask, both, 0, 1), "Add 1 above the line, too: p = 0 must cost 0 if y = 0."),
        (_dice(p, mask, both / 2, 1, 1), "Take twice the overlap: a perfect answer must give 0."),
        (_dice(hard, mask, hard * mask, 1, 1), "A threshold has no slope: take p as it is."),
        (_dice(p**2, mask, both, 1, 1), "Here the sums are of p itself, not of its square."),
        (1 - per_block.mean(), "Sum over the whole batch: an empty block has no Dice of its own."),
        (1 - _dice(p, mask, both, 1, 1), "That is the Dice; a loss should fall: return 1 - Dice."),
        (1 - _dice(p, mask, both, 0, 0), "That is the Dice; a loss should fall: return 1 - Dice."),
    ]
    if math.isnan(answer):
        return "0 / 0: with an empty mask and p = 0, this is not a number. Add the ones."
    if hint := recognise(answer, mistakes, 1e-5):
        return hint
    share = float(mask.mean())
    return f"With {share:.0%} foreground you return {answer:.3f}; check each of the three sums."


@question("a lazy network satisfies one loss with almost nothing, and the other with everything.")
def q3(laziest: Callable) -> str:
    """A share of foreground gives the constant p of least cross-entropy, and of least Dice loss."""
    for share in (0.01, 0.1, 0.5):
        answer = call(laziest, share)
        if np.shape(answer) != (2,):
            return "Return two probabilities: for cross-entropy, and for soft Dice."
        of_entropy, of_dice = (float(p) for p in answer)
        about = f"{share:.0%} foreground: "
        if not 0 <= min(of_entropy, of_dice) <= max(of_entropy, of_dice) <= 1:
            return f"{about}a probability lies between 0 and 1; you return {tuple(answer)}."
        if not np.isclose(of_entropy, share, rtol=0.02):
            costs = [
                -share * math.log(max(p, 1e-12)) - (1 - share) * math.log(max(1 - p, 1e-12))
                for p in (of_entropy, share)
            ]
            return (
                f"{about}cross-entropy of p = {of_entropy:g} is {costs[0]:.3f}, and "
                f"another p has {costs[1]:.3f}. Where is -f log p - (1 - f) log(1 - p) lowest?"
            )
        if of_dice < 0.98:
            costs = [1 - 2 * share * p / (p + share) for p in (of_dice, min(1, of_dice + 0.1))]
            return (
                f"{about}soft Dice of p = {of_dice:g} everywhere is {costs[0]:.3f}, and of a "
                f"larger p {costs[1]:.3f}: which p is at the end of that trend?"
            )
    return ""


@question("up to the peak in a few steps, then down along half a cosine.")
def q4(share: Callable) -> str:
    """A step (from 0), steps and warm-up steps give the share of the peak rate."""
    for steps, warm in [(200, 10), (40, 2), (100, 25)]:
        for step in (1, 0, warm - 1, steps - 1, (warm + steps) // 2, warm):
            answer = float(call(share, step, steps, warm))
            exact, mistakes = _shares(step, steps, warm)
            if np.isclose(answer, exact, rtol=1e-3):
                continue
            about = f"Step {step} of {steps}, {warm} of them warm-up: you return {answer:.3g}. "
            return about + (recognise(answer, mistakes) or f"Expected {exact:.3g}.")
    return ""


def _shares(step: int, steps: int, warm: int) -> tuple[float, list[tuple[float, str]]]:
    """The right share of the peak rate, and wrong ones with hints."""
    if step < warm:
        return (step + 1) / warm, [
            (step / warm, "The first step, number 0, would have no rate: take step + 1."),
            (step / (warm - 1), "Step 0 would have no rate: take (step + 1) / warm."),
            (1.0, "Warm up first: a straight line up to 1."),
            ((step + 1) / steps, "The peak is reached after the warm-up, not at the end."),
        ]
    after = (step - warm) / (steps - warm)
    curve = 0.5 * (1 + math.cos(math.pi * after))
    whole = 0.5 * (1 + math.cos(math.pi * step / steps))
    return FLOOR + (1 - FLOOR) * curve, [
        (curve, "It ends at 0: squeeze the cosine between 0.01 and 1."),
        (FLOOR + curve, "The peak is 1.01: squeeze the cosine between 0.01 and 1."),
        (max(FLOOR, curve), "Squeeze the cosine between 0.01 and 1, do not cut it off."),
        (whole, "The cosine begins at the end of the warm-up, not at step 0."),
        (FLOOR + (1 - FLOOR) * whole, "The cosine begins where the warm-up ends."),
        (math.cos(math.pi * after), "cos goes from 1 to -1: take (1 + cos) / 2."),
        (FLOOR + (1 - FLOOR) * (1 - after), "That is a line: use a cosine instead."),
        (step / warm, "The warm-up goes on too long: here the cosine has begun."),
        ((step + 1) / warm, "The warm-up goes on too long: here the cosine has begun."),
    ]
