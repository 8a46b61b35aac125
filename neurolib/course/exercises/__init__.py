"""Self-checks of the exercises: one module per notebook, one function per question.

A notebook imports its own, ``from neurolib.course.exercises import blocking as exercises``, and
asks ``exercises.q1(answer)``. What is printed is one of three states: not attempted, not yet (with
a hint for the mistake that was probably made), right. Answers that are functions are judged by what
they do with many inputs, not by how they are written.
"""

import functools
from collections.abc import Callable
from typing import Any


class _NotAttempted(Exception):
    """The answer, or what the reader's function returns, is still the dots of the stub."""


def question(praise: str) -> Callable:
    """Make a question of a judge: a function from an answer to a hint, empty if it is right.

    Parameters
    ----------
    praise : str
        Printed after "right": what the reader has just shown.
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
                # Whatever a reader's function raises is a state of the exercise, not a crash.
                hint = f"your answer raises {type(error).__name__}: {error}"
            print(f"✗ {judge.__name__}: not yet. {hint}" if hint else f"● right: {praise}")

        return ask

    return decorate


def attempt(value: Any) -> Any:
    """`value`, unless it is the dots of a stub."""
    if value is ...:
        raise _NotAttempted
    return value


def call(function: Callable, *arguments: Any) -> Any:
    """What the reader's function gives; the dots mean that it is not written yet."""
    if not callable(function):
        raise TypeError(f"expected a function, got {type(function).__name__}")
    return attempt(function(*arguments))
