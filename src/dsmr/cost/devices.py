"""Memory, bandwidth and peak speed of common GPUs, each with its source.

Peaks are dense with float32 accumulation, as in PyTorch's mixed precision. On GeForce cards this is half the peak
that is usually quoted; structured sparsity, which doubles it again, is not used in training.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from dsmr import UserError

Peak = Literal["float32", "bfloat16", "float16"]

GA102 = "NVIDIA Ampere GA102 GPU Architecture, V2.1, tables 2, 5 and appendix A"
ADA = "NVIDIA Ada GPU Architecture, V2.1, appendix A"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture, appendix A"


@dataclass(frozen=True)
class Device:
    """A GPU. Peak speeds are in TFLOP/s: float32 without tensor cores, the others with them."""

    name: str  # on the command line
    matches: str  # part of the name that torch reports
    memory_gib: float
    gigabytes_per_second: float  # memory bandwidth
    float32: float
    bfloat16: float | None  # None if the card does not compute in it
    float16: float
    source: str  # where these numbers were published

    def peak(self, kind: Peak) -> float | None:
        """Return the peak speed in FLOP/s; None if the card does not compute in this type."""
        teraflops = getattr(self, kind)
        return None if teraflops is None else 1e12 * teraflops


DEVICES = {
    device.name: device
    for device in (
        Device("rtx-3060-12gb", "RTX 3060", 12, 360, 12.7, 25.5, 25.5, GA102 + ", by the RTX 3060's cores and clock"),
        Device("rtx-3070-8gb", "RTX 3070", 8, 448, 20.3, 40.6, 40.6, GA102),
        Device("rtx-3080-10gb", "RTX 3080", 10, 760, 29.8, 59.5, 59.5, GA102),
        Device("rtx-3090-24gb", "RTX 3090", 24, 936, 35.6, 71.0, 71.0, GA102),
        Device("rtx-4060-8gb", "RTX 4060", 8, 272, 15.1, 30.2, 30.2, ADA + ", by the RTX 4060's cores and clock"),
        Device("rtx-4060-ti-16gb", "RTX 4060 Ti", 16, 288, 22.1, 44.1, 44.1, ADA + ", by its cores and clock"),
        Device("rtx-4070-12gb", "RTX 4070", 12, 504, 29.1, 58.3, 58.3, ADA),
        Device("rtx-4080-16gb", "RTX 4080", 16, 717, 48.7, 97.5, 97.5, ADA),
        Device("rtx-4090-24gb", "RTX 4090", 24, 1008, 82.6, 165.2, 165.2, ADA),
        Device("rtx-5070-12gb", "RTX 5070", 12, 672, 30.9, 61.7, 61.7, BLACKWELL),
        Device("rtx-5080-16gb", "RTX 5080", 16, 960, 56.3, 112.6, 112.6, BLACKWELL),
        Device("rtx-5090-32gb", "RTX 5090", 32, 1792, 104.8, 209.5, 209.5, BLACKWELL),
        Device("rtx-a6000-48gb", "RTX A6000", 48, 768, 38.7, 154.8, 154.8, GA102 + ", appendix C"),
        Device("t4-16gb", "Tesla T4", 15, 320, 8.1, None, 65.0, "NVIDIA T4 data sheet"),
        Device("v100-16gb", "V100", 16, 900, 15.7, None, 125.0, "NVIDIA V100 data sheet (SXM2)"),
        Device("a10-24gb", "A10", 24, 600, 31.2, 125.0, 125.0, "NVIDIA A10 data sheet"),
        Device("l4-24gb", "L4", 24, 300, 30.3, 121.0, 121.0, "NVIDIA L4 data sheet, without sparsity"),
        Device("l40s-48gb", "L40S", 48, 864, 91.6, 362.0, 362.0, "NVIDIA L40S data sheet, without sparsity"),
        Device("a100-40gb", "A100-SXM4-40GB", 40, 1555, 19.5, 312.0, 312.0, "NVIDIA A100 data sheet"),
        Device("a100-80gb", "A100-SXM4-80GB", 80, 2039, 19.5, 312.0, 312.0, "NVIDIA A100 data sheet (SXM)"),
        Device("h100-80gb", "H100 80GB HBM3", 80, 3350, 66.9, 989.4, 989.4, "NVIDIA H100 data sheet (SXM)"),
        Device("h200-141gb", "H200", 139, 4800, 66.9, 989.4, 989.4, "NVIDIA H200 data sheet (SXM)"),
    )
}


def find_device(name: str) -> Device:
    """Look up a device by its name on the command line; an unknown or ambiguous name raises UserError."""
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    if wanted in DEVICES:
        return DEVICES[wanted]
    begins = [known for known in DEVICES if known.startswith(wanted) or wanted in known]
    if len(begins) == 1:
        return DEVICES[begins[0]]
    close = begins or difflib.get_close_matches(wanted, DEVICES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(f"--device {name} is unknown; {hint}known: {', '.join(DEVICES)}")


def match_device(torch_name: str) -> Device | None:
    """Look up a device by the name that torch reports, such as `NVIDIA GeForce RTX 3060`; None if it is unknown.

    A longer name is another card: `RTX 4060 Ti` does not match `RTX 4060`.
    """
    other = r"(?!\s+(Ti|SUPER|Super|Laptop)\b|\w)"
    known = DEVICES.values()
    return next((one for one in known if re.search(rf"(^|\s){re.escape(one.matches)}{other}", torch_name)), None)
