"""The errors that people see: one line that says what, where, expected and remedy.

Every error that bad input can cause derives from `NeurolibError`, so that the command line
turns it into that one line and exit status 2, and nothing else is swallowed.
"""


class NeurolibError(ValueError):
    """Base of all errors caused by what the user gave, not by a fault of ours."""


class NeurolibWarning(UserWarning):
    """What was left out, guessed or converted of what the user gave; Python says each once."""


class VolumeError(NeurolibError):
    """An image volume is missing, unreadable, of the wrong shape, or has unusable values."""


class NothingFoundError(VolumeError):
    """No voxel of a volume is foreground, so that there is nothing to trace."""


class SwcError(NeurolibError):
    """An SWC file is missing, malformed, or not a forest of trees."""


class DataError(NeurolibError):
    """A data set or a pair of image and SWC cannot be used as it is."""


class WeightsError(NeurolibError):
    """Pre-trained weights or a checkpoint are missing, altered, or of another architecture."""


class SettingsError(NeurolibError):
    """A parameter, profile key, device or output location is not usable."""
