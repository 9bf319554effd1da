"""Map a function over untrusted files in worker processes: a hang or crash affects only that file."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as WorkerTimeout
from typing import Any

MAX_SECONDS_PER_FILE = 60.0
WORKER_THRESHOLD = 16  # starting processes takes longer than reading fewer files here


def map_in_workers(
    function: Callable[[str], Any],
    names: Sequence[str],
    *,
    num_workers: int | None = None,
    seconds: float = MAX_SECONDS_PER_FILE,
) -> Iterator[Any]:
    """Yield `function(name)` for every name, in order; a string with the reason if the call hangs or crashes.

    Every worker gets a copy of the function once; `seconds` limits one call. With one worker (default: one per core),
    or with few names, everything runs in this process, without a time limit.
    """
    num_workers = num_workers or num_usable_cores()
    if num_workers == 1 or len(names) < WORKER_THRESHOLD:
        yield from map(function, names)
        return
    from pebble import ProcessExpired, ProcessPool  # concurrent.futures fails as a whole when one worker dies

    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch or symusic have started threads
    with ProcessPool(num_workers, 0, _start, (function,), context) as pool:
        results = pool.map(_call, names, timeout=seconds).result()
        for _ in names:
            try:
                yield next(results)
            except WorkerTimeout:
                yield f"took longer than {seconds:g} s to read"
            except ProcessExpired as expired:
                yield f"crashed the process that read it (exit status {expired.exitcode})"


_function: Callable[[str], Any]
"""Of a worker process."""


def _start(function: Callable[[str], Any]) -> None:
    global _function
    _function = function


def _call(name: str) -> Any:
    return _function(name)


def num_usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
