"""Parameters and options: the values that they may have, and how their text is read.

Command line, profiles, grids and notebooks share these checks.
"""

import math
import re

from neurolib.errors import SettingsError

# The interval of each number, by the name of the option or parameter.
RANGES = {
    "accumulate": "[1, inf)",
    "average": "[0, 1)",
    "batch": "[1, inf)",
    "block": "[1, inf)",
    "bridge": "[0, inf)",
    "channel": "[0, inf)",
    "decoder_rate": "(0, inf)",
    "depth": "[1, inf)",
    "encoder_rate": "(0, inf)",
    "every": "[1, inf)",
    "filter_weight": "[0, inf)",
    "label": "[1, inf)",
    "layer_decay": "(0, 1]",
    "min_size": "[0, inf)",
    "negatives": "[0, inf)",
    "overlap": "[0, 0.9]",
    "patience": "[0, inf)",
    "save_every": "[1, inf)",
    "seed": "[0, 4294967295]",  # what NumPy and PyTorch both take
    "size": "[1, inf)",
    "step": "(0, inf)",
    "steps": "[1, inf)",
    "tau": "(0, 1]",
    "test_neurons": "[0, inf)",
    "threshold": "(0, 1]",
    "tolerance": "[0, inf)",
    "train_neurons": "[0, inf)",
    "validate_every": "[1, inf)",
    "validation_blocks": "[1, inf)",
    "validation_neurons": "[0, inf)",
    "warmup": "[0, 1]",
    "workers": "[0, inf)",
}
# Booleans as in YAML 1.1.
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def check_range(name: str, value: object, shown: str = "") -> None:
    """Refuse a number outside the interval that `RANGES` gives its name, else an infinite one.

    Values that are not numbers pass. The error shows `shown`, by default ``name=``, before the
    value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    left, low, high, right = re.fullmatch(
        r"([\[(])(.+), (.+)([\])])", RANGES.get(name, "(-inf, inf)")
    ).groups()
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    if above and below:
        return
    words = "at least" if left == "[" else "more than"
    wanted = {
        (False, False): f"{words} {low} and at most {high}",
        (False, True): f"{words} {low}",
        (True, True): "a finite number",
    }[math.isinf(float(low)), math.isinf(float(high))]
    raise SettingsError(f"{shown or name + '='}{value}: expected {wanted}")


def read_as(default: object, value: object, shown: str) -> object:
    """Convert a value, or its text, to the type of a parameter's default.

    ``007`` stays text where the default is text; ``1e-4`` is a number, unlike in YAML.
    """
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        text = value.strip()
        try:
            return TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise SettingsError(f"{shown}: expected {kind.__name__} as in {default!r}, got {value!r}")


def three_numbers(
    text: str, shown: str, positive: bool = False
) -> tuple[float, float, float] | None:
    """Parse three numbers separated by commas; None if `text` is empty."""
    if not text:
        return None
    try:
        first, second, third = map(float, text.split(","))
    except ValueError:
        first = second = third = math.nan
    numbers = first, second, third
    if not all((number > 0 or not positive) and math.isfinite(number) for number in numbers):
        kind = "positive numbers" if positive else "numbers"
        raise SettingsError(f"{shown}{text}: expected three {kind}, as in 3,1,1")
    return numbers
