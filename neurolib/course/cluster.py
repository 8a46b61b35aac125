"""Distribute work with Dask, over processes of this machine or a cluster that sees its files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from neurolib.errors import NeurolibError, SettingsError


def require_dask() -> None:
    """Refuse to continue without Dask."""
    if find_spec("distributed") is None:
        raise SettingsError(
            "several workers need Dask, which is not installed; pip install -e .[cluster]"
        )


@contextmanager
def connect(workers: int = 0, scheduler: str = "") -> Iterator[Any]:
    """A Dask client of the cluster at an address, or of `workers` processes of this machine."""
    require_dask()
    import distributed

    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    try:
        client = distributed.Client(**({"address": scheduler} if scheduler else local))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"scheduler={scheduler!r}: cannot be reached ({error}); give its address, such as "
            "tcp://10.0.0.1:8786"
        ) from None
    with client:
        yield client


def share(
    client: Any, function: Callable, items: Sequence
) -> Iterator[tuple[Any, Any | NeurolibError]]:
    """Call a function on each item; yield finished items, with a result or a `NeurolibError`.

    An item whose worker dies goes to another one, a few times. Other errors are raised.
    """
    import distributed

    # pure=False runs equal items as often as they are listed.
    jobs = {client.submit(function, item, pure=False): item for item in items}
    for job in distributed.as_completed(jobs):
        error = job.exception()
        if isinstance(error, distributed.scheduler.KilledWorker):
            error = SettingsError(
                f"the workers that tried a part died (the last: {error.last_worker}); perhaps they "
                "ran out of memory: use fewer workers, and run the same command to resume"
            )
        if error is not None and not isinstance(error, NeurolibError):
            raise error
        yield jobs[job], job.result() if error is None else error
