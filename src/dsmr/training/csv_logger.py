"""`metrics.csv`: appended to while a run goes on, and whole again after it was killed."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from dsmr import UserError
from dsmr.data.files import atomic_write

Row = dict[str, Any]


class MetricsWriter(ExperimentWriter):
    """Appends rows; where columns are added, and when it begins, the file is replaced as a whole.

    Of a run that goes on, the rows that its checkpoint knows are kept; those after them are computed again.

    Args:
        folder: of the run.
        num_kept: rows that stay of a file that is there.
    """

    def __init__(self, folder: str, num_kept: int) -> None:
        super().__init__(folder)
        self.path, self.num_rows = Path(self.metrics_file_path), num_kept
        self._has_begun = False

    def save(self) -> None:
        """Write what was logged since the last time.

        Raises:
            UserError: there is no room, or no right to write.
        """
        if not self.metrics:
            return
        try:
            self._write()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror or error}): make room, then go on with "
                f"dsmr fit --resume {self.path.parent}"
            ) from error
        self.num_rows += len(self.metrics)
        self.metrics = []

    def _write(self) -> None:
        if self._has_begun and not self._record_new_keys():
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(as_text(self.metrics, self.metrics_keys, header=False))
            return
        rows, columns = read(self.path) if self.num_rows else ([], [])
        self.metrics_keys = columns
        self._record_new_keys()
        with atomic_write(self.path) as file:
            file.write(as_text([*rows[: self.num_rows], *self.metrics], self.metrics_keys, header=True).encode())
        self._has_begun = True

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the file of a run that goes on."""


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger for a run's folder.

    Args:
        folder: of the run.
        num_kept: rows that stay of a run that goes on; 0 begins anew.
    """

    def __init__(self, folder: Path, num_kept: int = 0) -> None:
        super().__init__(folder.parent, name=folder.name, version="")
        self.num_kept = num_kept
        self._writer: MetricsWriter | None = None

    @property
    def num_rows(self) -> int:
        """Rows in the file, as far as it was saved."""
        return self.num_kept if self._writer is None else self._writer.num_rows

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file, on the first process."""
        if self._writer is None:
            self._experiment = self._writer = MetricsWriter(self.log_dir, self.num_kept)
        return self._writer


def read(path: Path) -> tuple[list[Row], list[str]]:
    """Whole rows of a file and its columns; a last line that was cut off is left out, a missing file has none."""
    if not path.is_file():
        return [], []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return [row for row in reader if None not in row.values()], list(reader.fieldnames or [])


def rows_before(path: Path, step: int) -> int:
    """How many rows stand before those that were logged at an optimizer step or after it."""
    return sum(row["step"].isdigit() and int(row["step"]) < step for row in read(path)[0])


def as_text(rows: list[Row], columns: list[str], *, header: bool) -> str:
    """Rows as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
