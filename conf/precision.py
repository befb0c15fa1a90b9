"""Which floating-point type the hardware at hand computes in. Emulated, bfloat16 is many times slower than float32."""

from enum import Enum
from typing import Any


class Dtype(Enum):
    auto = "auto"  # what the checkpoint is stored in
    native = "native"  # bfloat16 where the hardware computes in it, else float32
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def computes_bfloat16(on_cpu: bool) -> bool:
    """Whether matrix products in bfloat16 run natively: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    import torch

    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def torch_dtype(wanted: Dtype, on_cpu: bool, stored: Any = None) -> Any:
    """The torch dtype that a configured one means here; `stored` is what `auto` stands for."""
    import torch

    if wanted is Dtype.auto:
        return stored or torch.float32
    if wanted is Dtype.native:
        return torch.bfloat16 if computes_bfloat16(on_cpu) else torch.float32
    return getattr(torch, wanted.value)


def native_autocast(device_type: str) -> Any:
    """A context in which matrix products run in bfloat16 where the hardware computes in it."""
    import torch

    return torch.autocast(device_type, torch.bfloat16, enabled=computes_bfloat16(on_cpu=device_type == "cpu"))
