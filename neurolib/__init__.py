"""Helper package of the course: 3D neuron segmentation with 2D vision transformers.

Each notebook ``NN_stage`` has the module ``neurolib.stage`` beside it; the shared rooms
(volumes, SWC, data sets, weights, plots, runs) serve them all. `neurolib.segment` goes from an
image to a tree.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`neurolib.segment`, imported when it is asked for: it takes PyTorch along."""
    if name == "segment":
        from neurolib.segmentation import segment

        return segment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
