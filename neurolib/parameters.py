"""Parameters and options: the values they may take, and how they are read from text.

Command line, profiles, grids and notebooks share these checks.
"""

import math
from numbers import Real

from neurolib.errors import SettingsError

# The numbers (options or parameters) that must lie in each interval.
INTERVALS = {
    "[1, inf)": "accumulate batch block depth every label save_every size steps validate_every "
    "validation_blocks",
    "[0, inf)": "bridge channel filter_weight min_size negatives patience test_neurons tolerance "
    "train_neurons validation_neurons workers",
    "(0, inf)": "decoder_rate encoder_rate step",
    "[0, 1]": "warmup",
    "(0, 1]": "layer_decay tau threshold",
    "[0, 1)": "average",
    "[0, 0.9]": "overlap",
    "[0, 4294967295]": "seed",  # what NumPy and PyTorch both accept
}
# The interval of each number, by its name.
RANGES = {name: interval for interval, names in INTERVALS.items() for name in names.split()}
# Booleans as in YAML 1.1.
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def check_range(name: str, value: object, shown: str = "") -> None:
    """Refuse a number outside its interval in `RANGES`, or any that is not finite if it has none.

    Values that are not numbers pass. The error shows `shown`, by default ``name=``, before the
    value.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return
    interval = RANGES.get(name, "(-inf, inf)")
    low, high = interval[1:-1].split(", ")
    above = value >= float(low) if interval[0] == "[" else value > float(low)
    below = value <= float(high) if interval[-1] == "]" else value < float(high)
    if above and below:
        return
    words = "at least" if interval[0] == "[" else "more than"
    wanted = {
        (False, False): f"{words} {low} and {'at most' if interval[-1] == ']' else 'below'} {high}",
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
    raise SettingsError(f"{shown}: expected {kind.__name__}, such as {default!r}, got {value!r}")


def three_numbers(
    text: str, shown: str, positive: bool = False
) -> tuple[float, float, float] | None:
    """Parse three numbers separated by commas; None if `text` is empty."""
    if not text:
        return None
    try:
        numbers = tuple(map(float, text.replace("_", "?").split(",")))  # 1_0 is not a number
    except ValueError:
        numbers = ()
    good = [math.isfinite(number) and (number > 0 or not positive) for number in numbers]
    if good != [True] * 3:
        kind = "positive numbers" if positive else "numbers"
        raise SettingsError(f"{shown}{text}: expected three {kind}, as in 3,1,1")
    return numbers
