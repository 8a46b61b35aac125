"""What all tests share.

Tests read and fill the user's own cache (``$NEUROLIB_CACHE`` or ``~/.cache/neurite-vit``): the
pre-trained weights are fetched once, not once per run.
"""

import os

# Before torch is imported, also in kernels that tests start: idle OpenMP threads sleep. Spinning
# ones take the cores from the process beside them and slow a ViT six times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
