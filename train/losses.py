"""What fine-tuning minimises: a table of losses by name (`finetune.loss`).

A loss gets the model and one micro-batch and returns the loss *summed* over the target tokens and their number.
Sums, not means: the loop divides by the targets of the whole global batch, so that neither the number of
processes nor the split into micro-batches changes the training. The table's functions make a loss from the
configuration and the teacher, which is None for losses without one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import DISTILLATION, FinetuneConfig
from train.distillation import logits_and_hidden_states, logits_only
from train.rowwise import sum_over_rows
from train.stored_teacher import stored_logits
from train.targets import IGNORE, Batch, Loss, forward


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token negative log-likelihood in nats, in float32 whatever the logits are."""
    labels = batch["labels"].flatten()

    def of_rows(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        scores, wanted = logits.log_softmax(-1), labels[rows]
        loss = F.nll_loss(scores, wanted, ignore_index=IGNORE, reduction="sum")
        keep = (wanted != IGNORE)[:, None]
        return loss, scores.exp_().scatter_add_(1, wanted.clamp(min=0)[:, None], -keep.float()).mul_(keep)

    return sum_over_rows(forward(model, batch).logits, of_rows), torch.count_nonzero(labels != IGNORE)


LOSSES: dict[str, Callable[[FinetuneConfig, nn.Module | None], Loss]] = {
    "ce": lambda config, teacher: cross_entropy,
    "kd": logits_only,
    "kd+hidden": logits_and_hidden_states,
}


def check_loss(name: str) -> None:
    if name not in LOSSES:
        raise ValueError(f"finetune.loss={name} is unknown; there are: {', '.join(sorted(LOSSES))}")


def loss_function(config: FinetuneConfig, teacher: nn.Module | None = None) -> Loss:
    """The loss that `finetune.loss` names; a ValueError with the list if there is none of that name."""
    check_loss(config.loss)
    if config.teacher_top_k:
        return stored_logits(config)
    assert (teacher is not None) == (config.loss in DISTILLATION), config.loss
    return LOSSES[config.loss](config, teacher)
