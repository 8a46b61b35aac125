"""The peer, MONAI's U-Net: its size is right, and training and inference accept it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet as Residual
from test_training import FAST, tubes

from neurolib.errors import SettingsError
from neurolib.network import (
    EMPTY_LOGIT,
    STRIDES,
    UNET,
    NetworkSettings,
    UNet,
    build,
    make,
)
from neurolib.training import TrainingSettings, load_checkpoint, parameter_groups, train

SETTINGS = NetworkSettings(encoder=UNET, depth=5, block=100)


def test_it_is_monais_network_on_the_block():
    network, report = build(SETTINGS, "scratch", seed=1)
    assert isinstance(network, UNet)
    assert report is None
    assert isinstance(network.body, Residual)
    assert all(stride[0] == 1 for stride in STRIDES)  # no slice is pooled away
    network.eval()
    block = torch.rand(1, 1, 5, 104, 104)
    with torch.inference_mode():
        whole = network.body(block)[:, 0]
        assert torch.equal(network(block), whole[:, 2:3])
        every = make(dataclasses.replace(SETTINGS, predict="all")).eval()
        every.load_state_dict(network.state_dict())
        assert torch.equal(every(block), whole)
        # Sides that are no multiple of eight are padded and cut without a shift.
        cut = network(block[..., :100, :97])
    assert cut.shape == (1, 1, 100, 97)
    torch.testing.assert_close(cut[..., :40, :40], whole[:, 2:3, :40, :40], rtol=0.2, atol=0.3)


def test_it_starts_at_the_share_of_neurites():
    network = make(SETTINGS).eval()
    with torch.inference_mode():
        logits = network(torch.zeros(1, 1, 5, 48, 48))
    assert logits.mean().item() == pytest.approx(EMPTY_LOGIT, abs=1.0)


def test_all_its_weights_share_the_decoders_rate():
    groups = parameter_groups(make(SETTINGS), TrainingSettings(decoder_rate=2e-3))
    assert {group["lr"] for group in groups} == {2e-3}
    count = sum(p.numel() for group in groups for p in group["params"])
    assert count == sum(p.numel() for p in make(SETTINGS).parameters())


def test_it_is_trained_saved_and_rebuilt_like_any_other(tmp_path):
    small = dataclasses.replace(SETTINGS, depth=3, block=48)
    network, _ = build(small, "scratch", seed=0)
    result = train(network, [tubes("a", 0)], [tubes("v", 2)], Path(tmp_path), FAST)
    assert np.isfinite(result.history[-1]["loss"])
    again, facts = load_checkpoint(result.checkpoint)
    assert isinstance(again, UNet)
    assert facts["dice"] == result.dice
    block = torch.rand(1, 1, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(again(block), network.eval()(block))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: build(SETTINGS, "center"), "no pre-trained weights; expected 'scratch'"),
        (lambda: NetworkSettings(encoder=UNET, stem=True), "stem, contrast: expected False"),
    ],
)
def test_what_it_cannot_be_is_refused(make_it, message):
    with pytest.raises(SettingsError, match=message):
        make_it()


@pytest.mark.parametrize("setting", ["frozen", "checkpointing"])
def test_settings_for_transformers_are_refused(setting, tmp_path):
    small = dataclasses.replace(SETTINGS, depth=3, block=48)
    settings = dataclasses.replace(FAST, **{setting: True})
    with pytest.raises(SettingsError, match="which has no transformer"):
        train(make(small), [tubes("a", 0)], [tubes("v", 2)], tmp_path, settings)
