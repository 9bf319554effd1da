"""Progress bars for commands that are not Lightning's."""

from tqdm.auto import tqdm

from dsmr.data.preparation import Progress

_drawn: list[tqdm] = []


def close_bars() -> None:
    """End the lines of bars that an error left open."""
    while _drawn:
        _drawn.pop().close()


def bar(title: str, unit: str = "piece") -> Progress:
    """Progress callback that draws a bar on the terminal once it is first called."""
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
