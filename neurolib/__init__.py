"""Helper package of the course: 3D neuron segmentation with 2D vision transformers.

Each notebook ``NN_stage`` has the module ``neurolib.stage`` beside it; the shared rooms
(volumes, SWC, data sets, weights, plots, runs) serve them all.
"""

__version__ = "0.1.0"
