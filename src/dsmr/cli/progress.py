"""Progress bars of tasks that are not Lightning's."""

from tqdm.auto import tqdm

from dsmr.data.preparation import Progress

_drawn: list[tqdm] = []


def close_bars() -> None:
    """Close bars that an error left open, so that a message begins on a new line."""
    while _drawn:
        _drawn.pop().close()


def bar(title: str, unit: str = "piece") -> Progress:
    """Return a progress callback, which draws its bar at the first call."""
    drawn: tqdm | None = None

    def advance(done: int, total: int) -> None:
        nonlocal drawn
        if drawn is None:
            drawn = tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B")
            _drawn.append(drawn)
        drawn.update(done - drawn.n)
        if done == total:
            close_bars()

    return advance
