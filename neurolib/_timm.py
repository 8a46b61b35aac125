"""Import timm only from here: this also works with a CPU-only torch.

timm imports torchvision. Its Linux wheels on the Python package index are CUDA builds, whose
compiled operators do not load with a CPU build of torch; registering their shapes then fails with
"operator torchvision::nms does not exist". The course calls no torchvision operator, so it is
enough to declare the two schemas where they are missing. Calling such an operator still fails.
"""

import importlib

import torch

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    # The schemas vanish with the library object.
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

__all__ = ["timm"]
