"""Choosing the device to compute on, and the precision of its numbers."""

import contextlib
import functools
import sys
from pathlib import Path

import torch

from neurolib.errors import SettingsError

PRECISIONS = ("auto", "32-true", "bf16-mixed")
CPU_FACTS = Path("/proc/cpuinfo")


@functools.cache
def _say_once(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """The device with this name; ``auto`` is a GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            try:
                return pick_device("cuda")
            except SettingsError as error:  # this PyTorch does not support this GPU
                _say_once(f"{error}; 'auto' uses the CPU")
        elif torch.backends.mps.is_available():
            _say_once("Apple GPU found, not tested: 'auto' uses the CPU; device='mps' tries it")
    try:
        device = torch.device(name)
        (torch.ones(1, device=device) + 1).item()  # fails on a GPU that PyTorch does not support
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise SettingsError(f"device={name!r}: not usable here ({reason}); try 'cpu'") from None
    return device


@functools.cache
def _cpu_facts(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def pick_precision(name: str, device: str) -> str:
    """The precision with this name for a type of device; ``auto`` is the fastest one that is safe.

    ``auto`` is bfloat16 for matrix products if the hardware has it (GPUs from Ampere on,
    processors with AVX-512 BF16 or AMX: 1.8 to 2.6 times faster in training), else float32 (with
    only AVX2, bfloat16 is 7 times slower). `device` is ``cpu``, ``cuda`` or another type of
    `torch.device`.
    """
    if name not in PRECISIONS:
        raise SettingsError(f"precision={name!r}: expected one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        facts = _cpu_facts(CPU_FACTS) if device == "cpu" else ""
        fast = "avx512_bf16" in facts or "amx_bf16" in facts
    return "bf16-mixed" if fast else "32-true"


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager:
    """A context in which networks compute on a device with a precision of `pick_precision`."""
    if pick_precision(precision, device) == "32-true":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)
