"""`metrics.csv`: appended to during a run, and without gap or duplicate after a kill."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dsmr import UserError
from dsmr.data.files import atomic_write
from dsmr.results.run_files import METRICS_FILE

Row = dict[str, Any]
FLUSH_EVERY_N_STEPS = 100


class MetricsLogger(Logger):
    """Logs to `metrics.csv` of a run: one row for each logged step and each validation.

    Rows are appended; with a new column, and at the first writing, the file is replaced as a whole. Of a resumed run
    the first `num_kept` rows are kept, which its checkpoint knows, since those after them are computed again.
    """

    version = ""  # a run has one

    def __init__(self, folder: Path, num_kept: int = 0) -> None:
        super().__init__()
        self.path, self.num_rows = folder / METRICS_FILE, num_kept
        self._rows: list[Row] = []
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        """Folder of the run, for Lightning's own callbacks."""
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` has all settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; rows are written every 100 steps, and with each checkpoint."""
        assert step is not None
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._rows.append(row | {"step": step})
        if (step + 1) % FLUSH_EVERY_N_STEPS == 0:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that were logged since the last time; raises `UserError` if the disk is full."""
        if not self._rows:
            return
        try:
            self._write()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror or error}): make room, then resume with "
                f"dsmr fit --resume {self.path.parent}"
            ) from error
        self.num_rows += len(self._rows)
        self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _write(self) -> None:
        new = {name for row in self._rows for name in row}
        if self._columns is not None and new <= set(self._columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(rows_to_csv(self._rows, self._columns, header=False))
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows, columns = read_metrics(self.path) if self.num_rows else ([], [])
        self._columns = sorted({*columns, *new})
        with atomic_write(self.path) as file:
            file.write(rows_to_csv([*rows[: self.num_rows], *self._rows], self._columns, header=True).encode())


def read_metrics(path: Path) -> tuple[list[Row], list[str]]:
    """Return the complete rows of a file and its columns; a last line that was cut off is dropped."""
    if not path.is_file():
        return [], []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return [row for row in reader if None not in row.values()], list(reader.fieldnames or [])


def count_rows_before(path: Path, step: int) -> int:
    """Return the number of rows that were logged before an optimizer step."""
    return sum(row["step"].isdigit() and int(row["step"]) < step for row in read_metrics(path)[0])


def rows_to_csv(rows: list[Row], columns: list[str], *, header: bool) -> str:
    """Return rows as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
