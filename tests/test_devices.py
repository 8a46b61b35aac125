"""Devices and precisions, with the hardware's words put in."""

import pytest
import torch

from neurolib import devices
from neurolib.errors import SettingsError


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("flags : avx2 avx512f avx512_bf16", "bf16-mixed"),
        ("flags : amx_bf16 amx_tile", "bf16-mixed"),
        ("flags : avx2 avx512f", "32-true"),  # there bfloat16 is emulated, and slow
        (None, "32-true"),  # no such file: not Linux
    ],
)
def test_auto_precision_is_what_the_processor_has(flags, wanted, tmp_path, monkeypatch):
    facts = tmp_path / "cpuinfo"
    if flags:
        facts.write_text(flags)
    monkeypatch.setattr(devices, "CPU_FACTS", facts)
    assert devices.pick_precision("auto", "cpu") == wanted
    assert devices.pick_precision("32-true", "cpu") == "32-true"
    linear, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with devices.autocast("auto", "cpu"):
        assert linear(x).dtype == (torch.bfloat16 if wanted == "bf16-mixed" else torch.float32)


@pytest.mark.parametrize("has", [True, False])
def test_auto_precision_of_a_gpu_is_asked_from_it(has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert devices.pick_precision("auto", "cuda") == ("bf16-mixed" if has else "32-true")


def test_unknown_precision_is_refused():
    with pytest.raises(SettingsError, match=r"16bit.*expected one of auto"):
        devices.pick_precision("16bit", "cpu")
