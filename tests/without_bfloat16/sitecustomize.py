"""On PYTHONPATH: every Python process takes its CPU for one without bfloat16 (`make test-portable`)."""

import torch

torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
