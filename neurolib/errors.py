"""Errors that users see: one line with the problem, the place, what was expected, and a remedy.

Every error that bad input can cause derives from `NeurolibError`. The command line prints it as
one line and exits with status 2; all other exceptions pass through.
"""


class NeurolibError(ValueError):
    """Base of all errors that bad input causes."""


class NeurolibWarning(UserWarning):
    """Some input was left out, guessed or converted."""


class VolumeError(NeurolibError):
    """An image volume is missing, unreadable, of the wrong shape, or has unusable values."""


class NothingFoundError(VolumeError):
    """No voxel of a volume is foreground, so there is nothing to trace."""


class SwcError(NeurolibError):
    """An SWC file is missing, malformed, or not a forest of trees."""


class DataError(NeurolibError):
    """A data set or a pair of image and SWC cannot be used as it is."""


class WeightsError(NeurolibError):
    """Pre-trained weights or a checkpoint are missing, altered, or of another architecture."""


class SettingsError(NeurolibError):
    """A parameter, profile key, device or output location is not usable."""
