"""What fine-tuning minimises: a table of losses by name (`finetune.loss`).

A loss gets the model and one micro-batch and returns the loss *summed* over the target tokens and their number.
Sums, not means: the loop divides by the targets of the whole global batch, so that neither the number of
processes nor the split into micro-batches changes the training.

Shapes: B sequences, T tokens, V vocabulary. A batch holds `input_ids`, `position_ids` and `labels`, all [B, T];
`labels[b, t]` is what the logits at t should predict, or IGNORE (see train/batches.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, T, V]. Without `use_cache=False` transformers ignores the document boundaries in `position_ids`."""
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token negative log-likelihood in nats, in float32 whatever the logits are."""
    scores, labels = logits(model, batch), batch["labels"]
    loss = F.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, torch.count_nonzero(labels != IGNORE)


LOSSES: dict[str, Loss] = {"ce": cross_entropy}


def loss_function(name: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"finetune.loss={name} is unknown; there are: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]
