"""The contract with users: public names stay where they are, and results stay the same."""

import hashlib
import importlib
import subprocess
import sys

import numpy as np
import pytest

import neurolib
from neurolib import network
from neurolib.blocking import make_target
from neurolib.data import synthesis
from neurolib.inference import predict_volume
from neurolib.swc import components, length
from neurolib.tracing import trace

NAMES = {
    "volume": "read_volume write_volume Volume",
    "swc": "read_swc write_swc Tree",
    "blocking": "make_target block_grid read_block",
    "weights": "load_pretrained",
    "inflation": "fold_rgb inflate",
    "network": "NetworkSettings Segmenter build",
    "training": "TrainingSettings train load_checkpoint",
    "inference": "predict_volume",
    "evaluation": "dice hd95 tree_distance",
    "tracing": "trace",
    "errors": "NeurolibError VolumeError SwcError",
}
SHAPE = (24, 64, 72)
TREE = synthesis.grow(3, SHAPE)


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_where_they_were(module):
    imported = importlib.import_module(f"neurolib.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(imported, name)] == []
    assert callable(neurolib.segment)


def test_modules_are_found_under_their_old_names():
    old = importlib.import_module("neurolib.datasets")
    assert old.load_dataset is importlib.import_module("neurolib.data.datasets").load_dataset
    with pytest.raises(ModuleNotFoundError, match=r"neurolib\.nowhere"):
        importlib.import_module("neurolib.nowhere")
    for name in ("neurolib", "neurolib.cli"):
        command = [sys.executable, "-m", name, "--version"]
        shown = subprocess.check_output(command, text=True)
        assert shown == f"neurolib {neurolib.__version__}\n"


def test_target_and_traced_tree_are_what_they_were():
    response, mask = make_target(TREE, SHAPE, (2.0, 1.0, 1.0))
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16] == "7a334d5144507b95"
    assert (mask.sum(), float(response.sum())) == (1309, pytest.approx(486.96002, rel=1e-5))
    tree = trace(mask, (2.0, 1.0, 1.0))
    assert (len(tree.xyz), len(set(components(tree)))) == (95, 1)
    assert length(tree) == pytest.approx(156.935502, rel=1e-6)


def test_probability_is_what_it_was():
    settings = network.NetworkSettings(size=56, stem=True, contrast=True)
    net, _ = network.build(settings, "scratch", "", 0)
    image = synthesis.render(TREE, SHAPE, seed=3).data
    image = (image / image.max()).astype(np.float32)
    options = {"skip_empty": False, "progress": False, "device": "cpu"}
    probability = predict_volume(net, image, every=8, **options)
    assert probability.shape == (3, 64, 72)
    assert [float(probability.mean()), float(probability[1, 20, 30])] == pytest.approx(
        [0.0205, 0.0218], rel=0.05
    )
