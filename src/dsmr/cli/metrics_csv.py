"""`metrics.csv`, also of a run that goes on."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


def csv_logger(folder: Path, resumed_at: int | None) -> CSVLogger:
    """Lightning's CSV logger for a run's folder.

    Lightning begins the file anew; of a run that goes on, the rows before `resumed_at` (the optimizer steps in
    its checkpoint) are put back, and those that will be computed again are not.
    """
    path = folder / "metrics.csv"
    kept, keys = _rows(path, resumed_at) if resumed_at is not None and path.is_file() else ([], [])
    logger = CSVLogger(folder.parent, name=folder.name, version="")
    if kept and _is_rank_zero():
        logger.experiment.metrics_keys = keys
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(kept)
    return logger


@rank_zero_only
def _is_rank_zero() -> bool:
    return True


def _rows(path: Path, end: int) -> tuple[list[dict[str, str]], list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        return [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < end], list(
            reader.fieldnames or []
        )
