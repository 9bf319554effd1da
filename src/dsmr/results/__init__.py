"""Results as tables and pictures: `collect` reads them, `tables` and `plots` show them."""

from dsmr.results.plots import Depth, check_pictures, plot_piano_roll, plot_recall, plot_schedules
from dsmr.results.tables import benchmark_table

__all__ = ["Depth", "benchmark_table", "check_pictures", "plot_piano_roll", "plot_recall", "plot_schedules"]
