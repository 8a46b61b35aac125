"""timm, imported so that it also works beside a CPU-only torch.

timm imports torchvision for its data transforms. The Linux wheels of torchvision on the Python
package index are CUDA builds: beside a CPU build of torch their compiled operators do not load,
and Python code that only *registers* shapes for those operators fails with "operator
torchvision::nms does not exist". Nothing here calls a torchvision operator, so declaring the two
schemas that are registered is enough. It is done only where the operators are missing; a real
call of them still fails, as it should.

Import timm through this module (``from neurolib._timm import timm``), here and nowhere else.
"""

import importlib

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    # The library object must outlive this module: its schemas vanish with it.
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _name, _schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, _name):
            _LIBRARY.define(_schema)

import timm  # noqa: E402

__all__ = ["timm"]
