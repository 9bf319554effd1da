"""Turn the errors that Lightning, torch and users' classes raise about settings into `UserError`."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jsonargparse import Namespace, add_instantiator
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dsmr import UserError
from dsmr.cli import nearest

LIBRARIES = ("lightning", "pytorch_lightning", "torch", "torchmetrics")
"""Errors that these packages raise themselves may be about settings; others are bugs."""
BELOW = {*sys.stdlib_module_names, "fsspec"}
REFUSING = (ValueError, RuntimeError, ImportError, OSError, MisconfigurationException)

Failures = list[tuple[type, Exception]]
_failures: ContextVar[Failures | None] = ContextVar("_failures", default=None)


def record_failure(class_type: type, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a configured class and record its exception."""
    try:
        return class_type(*args, **kwargs)
    except Exception as error:
        if (failures := _failures.get()) is not None:
            failures.append((class_type, error))
        raise


add_instantiator(record_failure, object)


@contextmanager
def errors_of_settings(settings: Namespace) -> Iterator[None]:
    """Raise UserError if a library or a user's class refuses a setting while objects are built.

    jsonargparse wraps an error in a report on all alternatives of a type; `record_failure` has recorded the original.
    """
    failures: Failures = []
    token = _failures.set(failures)
    try:
        yield
    except Exception as error:
        cls, cause = next((one for one in reversed(failures) if is_within(one[1], error)), (None, error))
        if not is_refusal(cause, cls):
            if cause is error:
                raise
            raise cause from None
        key = "trainer"
        if cls is not None:
            own = "model" if issubclass(cls, LightningModule) else "data"
            key = f"{key_of(cls, settings.as_dict()) or own}: {cls.__name__}"
        words = str(cause) or type(cause).__name__
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            words = f"the package {cause.name.partition('.')[0]} is not installed"
        raise UserError(f"{key}: {words}") from cause
    finally:
        _failures.reset(token)


def is_within(cause: Exception, error: Exception) -> bool:
    """Return True if an error is another one, or quotes it as jsonargparse does, with other indentation."""
    text = " ".join(str(cause).split())
    return cause is error or (bool(text) and text in " ".join(str(error).split()))


def is_refusal(error: Exception, cls: type | None = None) -> bool:
    """Return True if an error is about a setting: a library raised it, or it is a ValueError of a user's class."""
    is_theirs = cls is not None and cls.__module__.partition(".")[0] != "dsmr"
    kinds = (*REFUSING, TypeError) if is_theirs else REFUSING  # any other TypeError is a wrong call of ours
    is_raised = isinstance(error, kinds) and raised_in(error).partition(".")[0] in LIBRARIES
    return is_raised or (is_theirs and isinstance(error, ValueError))


def raised_in(error: Exception) -> str:
    """Return the module that raised an error, disregarding calls into the standard library."""
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    outside = [name for name in frames if name.partition(".")[0] not in BELOW]
    return outside[-1] if outside else ""


@contextmanager
def errors_of_training(trainer: Trainer) -> Iterator[None]:
    """Explain what libraries refuse only in training: metrics to monitor, steps of an optimizer, folders."""
    try:
        yield
    except Exception as error:
        reason = unlogged(trainer, error) if is_refusal(error) else ""
        if isinstance(error, OSError) and error.filename and is_refusal(error):
            reason = f"cannot write {error.filename} ({error.strerror}); name another folder"
        reason = reason or unsteppable(trainer, error)
        if isinstance(error, ValueError) and raised_in(error).partition(".")[0] in ("lightning", "pytorch_lightning"):
            reason = reason or str(error)
        if not reason:
            raise
        raise UserError(reason) from error


def unsteppable(trainer: Trainer, error: Exception) -> str:
    """Explain an error of torch's optimizers and schedulers about their settings; empty for other errors."""
    module = raised_in(error)
    is_ours = any(type(one).__module__.startswith("dsmr.") for one in trainer.optimizers)
    is_setting = isinstance(error, (ValueError, ZeroDivisionError)) or (type(error) is RuntimeError and not is_ours)
    if not (module.startswith("torch.optim") and is_setting):
        return ""
    return f"model.{'lr_scheduler' if 'lr_scheduler' in module else 'optimizer'}: {error}"


def unlogged(trainer: Trainer, error: Exception) -> str:
    """Explain that a callback or a scheduler monitors a metric that is not logged; empty for other errors."""
    logged = sorted(trainer.callback_metrics)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    watched = [(type(one).__name__, getattr(one, "monitor", None)) for one in callbacks]
    watched += [("model.lr_scheduler", config.monitor) for config in trainer.lr_scheduler_configs]
    for name, metric in watched:
        if isinstance(metric, str) and metric not in logged and metric in str(error):
            return f"{name} watches {metric}, which is not logged{nearest(metric, logged)}"
    return ""


def key_of(cls: type, settings: Any, key: str = "") -> str:
    """Return the key of the setting that names a class; empty if there is none."""
    if isinstance(settings, dict):
        if str(settings.get("class_path", "")).rpartition(".")[2] == cls.__name__:
            return key
        items = [(f"{key}.{name}".strip("."), value) for name, value in settings.items() if name != "init_args"]
        items += [(key, settings["init_args"])] if "init_args" in settings else []
    else:
        items = [(key, value) for value in settings] if isinstance(settings, list) else []
    return next((found for name, value in items if (found := key_of(cls, value, name))), "")
