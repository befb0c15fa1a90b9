"""Which device a configuration means on this machine."""

from conf.schema import Device

NO_CUDA = "launch.device=cuda, but torch sees no CUDA device; use launch.device=auto or cpu"


def pick_device(device: Device) -> str:
    """`cuda` or `cpu`; ValueError where CUDA is asked for and there is none."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError(NO_CUDA)
    return "cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu"
