"""Class paths of earlier versions, so that old configs and run folders stay usable."""

FORMER_PATHS = {
    "dsmr.optim": "dsmr.training.optimizers",
    "dsmr.module": "dsmr.training.module",
    "dsmr.callbacks.Samples": "dsmr.generate.samples.Samples",
    "dsmr.callbacks.samples": "dsmr.generate.samples",
    "dsmr.callbacks": "dsmr.training.callbacks",
    "dsmr.checkpoint_io": "dsmr.training.checkpoint",
    "dsmr.metrics_csv": "dsmr.training.csv_logger",
}
"""Modules and classes that have moved, the more specific ones first."""


def current_path(path: str) -> str:
    """Return where a class or module of an earlier version is now; any other string is returned unchanged."""
    for former, current in FORMER_PATHS.items():
        if path == former or path.startswith(f"{former}."):
            return current + path[len(former) :]
    return path
