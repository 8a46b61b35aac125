"""Self-checks of the exercises: one module per notebook, one function per question.

A notebook imports its module, ``from neurolib.course.exercises import blocking as exercises``, and
calls ``exercises.q1(answer)``. This prints one of three states: not attempted, not yet (with a hint
for the likely mistake), right. Functions are judged by their results for many inputs.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


class _NotAttempted(Exception):
    """The answer, or the result of the reader's function, is still the dots of the stub."""


def question(praise: str) -> Callable:
    """Turn a judge, which maps an answer to a hint or to "" if it is right, into a question.

    `praise` is printed after "right".
    """

    def decorate(judge: Callable[[Any], str]) -> Callable[[Any], None]:
        @functools.wraps(judge)
        def ask(answer: Any) -> None:
            try:
                hint = judge(attempt(answer))
            except _NotAttempted:
                print(f"○ {judge.__name__}: not attempted; put your answer in place of the dots")
                return
            except Exception as error:
                # An error in the reader's function must not end the cell.
                hint = f"Your answer raises {type(error).__name__}: {error}"
            print(f"✗ {judge.__name__}: not yet. {hint}" if hint else f"● right: {praise}")

        return ask

    return decorate


def attempt(value: Any) -> Any:
    """`value`, unless it is the dots of a stub."""
    if value is ...:
        raise _NotAttempted
    return value


def call(function: Callable, *arguments: Any) -> Any:
    """Result of the reader's function; the dots mean that it is not written yet."""
    if not callable(function):
        raise TypeError(f"expected a function, got {type(function).__name__}")
    return attempt(function(*arguments))


def recognise(answer: Any, mistakes: Iterable[tuple[Any, str]], rtol: float = 1e-3) -> str:
    """The hint of the first mistake (its result, the hint) that gives the same answer, or ""."""
    for wrong, hint in mistakes:
        if np.shape(answer) == np.shape(wrong) and np.allclose(answer, wrong, rtol):
            return hint
    return ""
