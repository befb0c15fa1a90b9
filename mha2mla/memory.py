"""Memory that is not in use goes back to the system: allocators keep it, and a peak would be seen over it."""

import ctypes
import gc
import sys

import torch


def hand_back(device: torch.device | str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
