"""The method of the course: 3D neuron segmentation with 2D vision transformers.

The modules follow the paper, and notebooks 01 to 05 go through them in this order: `blocking`,
`weights`, `inflation`, `network`, `training`, `inference`, `evaluation`, `tracing`. They build on
`volume` and `swc`. Formats and data sets are in `neurolib.data`, the command line, runs and figures
in `neurolib.course`. `neurolib.segment` goes from an image to a tree.
"""

import sys
from importlib import import_module, util
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `neurolib.segment` on first use, because it imports PyTorch."""
    if name == "segment":
        from neurolib.segmentation import segment

        return segment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Moved:
    """Finds modules of `data` and `course` by their old flat names, such as `neurolib.datasets`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        package, _, module = name.partition(".")
        if package != __name__ or not module.isidentifier():
            return None
        places = (f"{__name__}.{folder}.{module}" for folder in ("data", "course"))
        place = next(filter(util.find_spec, places), None)
        return place and util.spec_from_loader(name, self, origin=place)

    def create_module(self, spec: object) -> None:
        """Let Python create a plain module."""

    def get_code(self, name: str) -> object:
        """For ``python -m neurolib.cli``."""
        moved = util.find_spec(util.find_spec(name).origin)
        return moved.loader.get_code(moved.name)

    def exec_module(self, module: ModuleType) -> None:
        """Copy the contents of the module from its new place."""
        moved = vars(import_module(module.__spec__.origin))
        vars(module).update({k: v for k, v in moved.items() if not k.startswith("__")})


sys.meta_path.append(_Moved())
