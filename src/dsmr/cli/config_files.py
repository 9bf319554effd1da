"""Config files by path or by shipped name: `--config two_scale` finds `configs/horizons/two_scale.yaml`."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from dsmr import UserError
from dsmr.cli import nearest
from dsmr.cli.yaml_values import Loader, key_lines

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = next(f for f in (_PACKAGE / "configs", _PACKAGE.parent.parent / "configs") if f.is_dir())
"""The shipped configs: inside the installed package, or at the top of a checkout."""
SWEEPS = FOLDER / "sweeps"  # the shipped sweep files, which are not configs


def shipped() -> dict[str, Path]:
    """Return the shipped configs by name, such as `base` or `horizons/two_scale`."""
    paths = (path for path in sorted(FOLDER.rglob("*.yaml")) if path.parent != SWEEPS)
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths}


def find_config(given: str) -> Path:
    """Return the config file of a path or a shipped name, whose folder may be left out."""
    path = Path(given)
    if path.is_file():
        content = yaml.load(check_yaml(path).read_text(encoding="utf-8-sig"), Loader)
        if content is not None and not isinstance(content, dict):
            what = "a list" if isinstance(content, list) else f"the single value {content}"
            hint = "write keys and values, such as data: {num_lanes: 8}"
            raise UserError(f"{path} holds {what}, not settings; {hint}")
        return path
    known = shipped()
    matches = [path for name, path in known.items() if given in (name, name.rpartition("/")[2])]
    if not matches and (given == "" or path.is_dir()):
        raise UserError(f"--config {given or repr(given)} is not a file; give a file or a shipped name such as smoke")
    if not matches:
        hint = nearest(given, known) or f"; shipped: {', '.join(name.rpartition('/')[2] for name in known)}"
        raise UserError(f"--config {given}: no such file or shipped config{hint}")
    if len(matches) > 1:
        choices = " or ".join(name for name, path in known.items() if path in matches)
        raise UserError(f"--config {given} is ambiguous; write {choices}")
    return matches[0]


def check_yaml(path: Path) -> Path:
    """Return the path of a file that holds YAML."""
    try:
        yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; save it as UTF-8, or give another file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: {error.problem}; correct it there") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    return path


def resolve_configs(arguments: list[str]) -> list[str]:
    """Replace every `--config NAME` by the path of its file."""
    resolved: list[str] = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if index and arguments[index - 1] in ("--config", "-c"):
            resolved.append(str(find_config(argument)))
        elif option in ("--config", "-c") and equals:
            resolved.append(f"{option}={find_config(value)}")
        else:
            resolved.append(argument)
    return resolved


def take_option(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of an option, and the command line without it."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != option:
            continue
        if not equals and index + 1 == len(arguments):
            raise UserError(f"{option} needs a value")
        rest = arguments[:index] + arguments[index + (1 if equals else 2) :]
        if any(other.partition("=")[0] == option for other in rest):
            raise UserError(f"{option} is given twice; give it once")
        return value if equals else arguments[index + 1], rest
    return None, arguments


def config_values(arguments: list[str]) -> list[str]:
    """Return all values of `--config`."""
    values = [following for option, following in pairwise(arguments) if option in ("--config", "-c")]
    return values + [a.partition("=")[2] for a in arguments if a.startswith(("--config=", "-c="))]


def left_out(arguments: list[str], options: Sequence[str]) -> list[str]:
    """Return the command line without some options and all keys below them."""
    left = tuple(f"{option}." for option in options)
    return [part for name, parts in grouped(arguments) if not f"{name}.".startswith(left) for part in parts]


def grouped(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Split a command line into options, each with its parts: `--a=1`, or `--a` and its values."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--") or argument == "-c" or not found:
            found.append((argument.partition("=")[0], [argument]))
        else:
            found[-1][1].append(argument)
    return found


def has_training_settings(arguments: list[str]) -> bool:
    """Return True if a `--config` has settings of model or trainer, not only of data."""
    contents = [yaml.safe_load(find_config(given).read_text(encoding="utf-8")) for given in config_values(arguments)]
    return any(isinstance(content, dict) and content.keys() & {"model", "trainer"} for content in contents)


def location_of_key(key: str, path: Path) -> str:
    """Return file and line of a key, ` (a.yaml, line 3)`; the file alone if it does not have the key."""
    last = key.rpartition(".")[2]
    found = key_lines(path.read_text(encoding="utf-8-sig")).items()
    line = next((f", line {line}" for keys, line in found if keys[-1] == last), "")
    return f" ({path}{line})"
