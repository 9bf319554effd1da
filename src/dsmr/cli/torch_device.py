"""The torch device of commands that run a network without a trainer."""

import torch

from dsmr import UserError


def check_device(name: str) -> torch.device:
    """Return the named device.

    Raises:
        UserError: this machine does not have it; the message names those that it has.
    """
    kind, _, index = name.partition(":")
    here = devices_here()
    is_one = kind in here and (index == "" or (index.isdecimal() and int(index) < here[kind]))
    if not is_one:
        known = [one for kind, num in here.items() for one in (kind, *(f"{kind}:{i}" for i in range(1, num)))]
        raise UserError(f"--device {name}: this machine has {', '.join(known)}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error


def devices_here() -> dict[str, int]:
    """Number of devices of each kind that torch finds, by torch's name for the kind."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return {"cpu": 1} | ({} if found is None else {found.type: torch.accelerator.device_count()})
