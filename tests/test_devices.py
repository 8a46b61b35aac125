"""Devices and precisions, with simulated hardware."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neurolib import devices
from neurolib.errors import SettingsError
from neurolib.inference import predict_volume
from neurolib.network import NetworkSettings, make
from neurolib.training import LOSSES, device_name, loss_terms, start_fabric
from neurolib.volume import normalise


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


@pytest.mark.parametrize("name", ["meta", "hpu", "mps", "CPU", "", "cuda:99", "0"])
def test_a_device_that_cannot_compute_here_is_one_line(name):
    with pytest.raises(SettingsError, match=r"not usable here .*; try 'cpu'") as caught:
        devices.pick_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU that computes")
def test_auto_takes_the_cpu_beside_a_gpu_that_fails(monkeypatch, capsys):
    """As one does that is too old for this PyTorch: it is there, and computes nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices._say_once.cache_clear()
    assert devices.pick_device("auto").type == "cpu"
    assert "'auto' uses the CPU" in capsys.readouterr().err


class NoDoubles(TorchDispatchMode):
    """Apple's rule for its GPU, here for all of PyTorch: no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        assert getattr(found, "dtype", None) != torch.float64, function
        return found


@pytest.mark.parametrize("kind", ["float64", "uint16"])
def test_networks_compute_without_float64(kind):
    network = make(NetworkSettings(encoder="monai_unet", depth=5, block=32, size=32))
    data = np.random.default_rng(0).integers(0, 99, (6, 40, 40)).astype(kind)
    block, response = torch.rand(2, 1, 5, 32, 32), torch.rand(2, 5, 32, 32)
    with NoDoubles():
        predict_volume(network, normalise(data), device="cpu", progress=False)
        out = network(block)
        wanted = response[:, :1] if out.shape[1] == 1 else response
        for loss in LOSSES:
            sum(loss_terms(loss, out, wanted, 0.1).values()).backward(retain_graph=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_result_names_its_precision(precision):
    assert device_name(start_fabric("cpu", precision)) == f"CPU, {precision}"


def test_unknown_precision_is_refused():
    with pytest.raises(SettingsError, match=r"16bit.*expected one of auto"):
        devices.pick_precision("16bit", "cpu")
