"""What a loss is given, and how it asks a model: a micro-batch of packed documents, forwards without a cache.

Shapes: B sequences, T tokens. A batch holds `input_ids`, `position_ids` and `labels`, all [B, T]; `labels[b, t]` is
what the logits at t should predict, or IGNORE (see train/batches.py).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mha2mla.output_head import IGNORED

IGNORE = IGNORED
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # summed over the targets, and their number


def forward(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """The model's output. Without `use_cache=False` transformers ignores the document boundaries in `position_ids`."""
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **options)
