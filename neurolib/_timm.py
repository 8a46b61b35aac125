"""timm, imported so that it also works beside a CPU-only torch; import it from here alone.

timm imports torchvision for its data transforms. The Linux wheels of torchvision on the Python
package index are CUDA builds: beside a CPU build of torch their compiled operators do not load,
and Python code that only *registers* shapes for those operators fails with "operator
torchvision::nms does not exist". Nothing here calls a torchvision operator, so declaring the two
schemas that are registered is enough. It is done only where the operators are missing; a real
call of them still fails, as it should.
"""

import importlib

import torch

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    # The library object must outlive this module: its schemas vanish with it.
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

__all__ = ["timm"]
