"""The method of the course: 3D neuron segmentation with 2D vision transformers.

Each notebook ``NN_stage`` has the module ``neurolib.stage`` beside it, in the order of the paper:
`blocking`, `weights`, `inflation`, `network`, `training`, `inference`, `evaluation`, `tracing`.
They stand on `volume` and `swc`. Formats and data sets are in `neurolib.data`, the command line,
runs and figures in `neurolib.course`. `neurolib.segment` goes from an image to a tree.
"""

import sys
from importlib import import_module, util
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`neurolib.segment`, imported when it is asked for: it takes PyTorch along."""
    if name == "segment":
        from neurolib.segmentation import segment

        return segment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Moved:
    """Finds modules under the names that they had when all lay flat, as `neurolib.datasets`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        package, _, module = name.partition(".")
        if package != __name__ or not module.isidentifier():
            return None
        places = (f"{__name__}.{room}.{module}" for room in ("data", "course"))
        place = next(filter(util.find_spec, places), None)
        return place and util.spec_from_loader(name, self, origin=place)

    def create_module(self, spec: object) -> None:
        """A plain module."""

    def get_code(self, name: str) -> object:
        """For ``python -m neurolib.cli``."""
        there = util.find_spec(util.find_spec(name).origin)
        return there.loader.get_code(there.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give it all that the module has in its new place."""
        there = vars(import_module(module.__spec__.origin))
        vars(module).update({k: v for k, v in there.items() if not k.startswith("__")})


sys.meta_path.append(_Moved())
