"""The GPU of this machine, asked for only by commands that need one."""

from __future__ import annotations

import torch


def the_gpu() -> torch.device:
    """The current GPU. Raises ValueError if torch sees none."""
    if not torch.cuda.is_available():
        raise ValueError("needs a GPU, and torch sees none on this machine")
    return torch.device("cuda", torch.cuda.current_device())


def arch_of(device: torch.device) -> int:
    """The compute capability as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
