"""Reading files that nobody has checked, in worker processes: one that hangs or crashes takes nobody with it."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as TookTooLong
from typing import Any

MAX_SECONDS_EACH = 60.0
FEW = 16  # files; so few are read in this process, since starting others takes longer


def each(
    function: Callable[[str], Any],
    names: Sequence[str],
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
    *,
    num_workers: int | None = None,
    seconds: float = MAX_SECONDS_EACH,
) -> Iterator[Any]:
    """Results of a function for every name, in order; a text instead for a file that hangs or crashes its worker.

    Args:
        function: called in a worker with a name.
        names: what to call it with.
        initializer: called once in every worker; None for nothing.
        initargs: with these.
        num_workers: processes; None means one for each core; 1, or few names: in this process, without a limit.
        seconds: that one call may take.
    """
    if (num_workers or usable_cores()) == 1 or len(names) < FEW:
        if initializer is not None:
            initializer(*initargs)
        yield from map(function, names)
        return
    from pebble import ProcessExpired, ProcessPool

    context = multiprocessing.get_context("spawn")
    with ProcessPool(num_workers or usable_cores(), 0, initializer, initargs, context) as pool:
        results = pool.map(function, names, timeout=seconds).result()
        for _ in names:
            try:
                yield next(results)
            except TookTooLong:
                yield f"took longer than {seconds:g} s to read"
            except ProcessExpired as expired:
                yield f"ended the process that read it, with exit status {expired.exitcode}"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
