"""Memory of this process: torch's allocator's on a GPU, the resident set on a CPU."""

import os
import resource
import sys
from pathlib import Path

import psutil
import torch


def peak_bytes(device: torch.device) -> int:
    """The most that was held since `reset_peak`, or since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes(device: torch.device) -> int:
    """What is held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> bool:
    """Count peaks from now on; False where the system cannot (a CPU's, outside Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return False
    clear.write_text("5")
    return True


def peak_memory_gib(device: torch.device) -> float:
    """`peak_bytes` for the record of a stage."""
    return round(peak_bytes(device) / 2**30, 2)
