"""Peak memory of a stage, for its record."""

import resource
import sys

import torch


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU if it trains there, else all of it."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
