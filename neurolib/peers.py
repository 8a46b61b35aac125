"""The network that a user would take instead: MONAI's 3D U-Net, in the harness of the course.

It sees the same blocks, is trained by the same loop and judged by the same numbers as
`neurolib.network.Segmenter`. MONAI is no dependency of the course: ``pip install monai``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from neurolib.errors import SettingsError
from neurolib.network import EMPTY_LOGIT, NetworkSettings

CHANNELS = (32, 64, 128, 256)
# Blocks have few slices, which are never pooled; rows and columns three times.
STRIDES = ((1, 2, 2),) * 3


class UNet(nn.Module):
    """MONAI's residual U-Net (Kerfoot et al. 2019) on blocks of slices.

    Parameters
    ----------
    settings : NetworkSettings
        Of which depth, block and predict matter.

    Notes
    -----
    Input (B, 1, D, h, w), values in [0, 1]; output logits (B, 1, h, w) of the centre slice for
    ``predict="center"``, (B, D, h, w) for ``"all"``, as of a `Segmenter`.

    Raises
    ------
    SettingsError
        If MONAI is not installed.
    """

    # There is no pre-trained part with a rate of its own.
    encoder = None

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        try:
            from monai.networks.nets import UNet as Residual
        except ImportError:
            raise SettingsError(
                f"encoder={settings.encoder!r}: needs MONAI; pip install monai"
            ) from None
        self.settings = settings
        self.initialisation, self.weights_file, self.seed, self.fold = "scratch", "", 0, "exact"
        self.training_begun = None
        self.body = Residual(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=CHANNELS,
            strides=STRIDES,
            num_res_units=2,
        )
        last = [m for m in self.body.modules() if isinstance(m, nn.Conv3d) and m.out_channels == 1]
        nn.init.constant_(last[-1].bias, EMPTY_LOGIT)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        height, width = blocks.shape[-2:]
        step = 2 ** len(STRIDES)
        pad = [-side % step for side in (width, height)]
        # Slices as channels: only rows and columns are reflected.
        flat = F.pad(blocks[:, 0], (0, pad[0], 0, pad[1]), mode="reflect")
        logits = self.body(flat[:, None])[:, 0, :, :height, :width]
        if self.settings.predict == "all":
            return logits
        middle = logits.shape[1] // 2
        return logits[:, middle : middle + 1]
