"""Losses that learn from a teacher, as a rule the original model: all it thinks of the next token, not only the token.

- `kd`: KL divergence of the student's next-token distribution from the teacher's, both at temperature t, times t²
  so that gradients keep their size (Hinton et al., arXiv 1503.02531).
- `kd+hidden`: plus `finetune.hidden_weight` times the relative squared error of the hidden states after each decoder
  layer, ‖student - teacher‖² / ‖teacher‖², averaged over the layers. transformers gives the last layer's states
  after the final norm.

Both are summed over the target tokens (train/losses.py). The teacher's logits are made from its last hidden states
for a few rows at a time, when the loss asks for them: a second [N, V] never stands in memory.

Shapes: B sequences, T tokens, N = B * T rows, n of them in a chunk, V vocabulary, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import FinetuneConfig
from mha2mla.output_head import LogitsOf, ask
from train.rowwise import RowLoss, sum_over_rows
from train.targets import IGNORE, Batch, Loss, forward


def logits_only(config: FinetuneConfig, teacher: nn.Module | None) -> Loss:
    """`finetune.loss=kd`."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = batch["labels"] != IGNORE
        # The teacher first: its activations are gone before the student's, which backward needs, are made.
        teacher_logits, _ = teach(teacher, batch)
        row_loss = divergence(teacher_logits, keep.flatten(), config.kd_temperature)
        return sum_over_rows(forward(model, batch).logits, row_loss), torch.count_nonzero(keep)

    return loss


def logits_and_hidden_states(config: FinetuneConfig, teacher: nn.Module | None) -> Loss:
    """`finetune.loss=kd+hidden`."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = batch["labels"] != IGNORE
        teacher_logits, teacher_states = teach(teacher, batch, output_hidden_states=True)
        output = forward(model, batch, output_hidden_states=True)
        row_loss = divergence(teacher_logits, keep.flatten(), config.kd_temperature)
        total = sum_over_rows(output.logits, row_loss)
        total = total + config.hidden_weight * relative_error(output.hidden_states[1:], teacher_states[1:], keep)
        return total, torch.count_nonzero(keep)

    return loss


@torch.no_grad()
def teach(teacher: Any, batch: Batch, **options: bool) -> tuple[LogitsOf, tuple[Tensor, ...]]:
    """The teacher's logits by rows, and the hidden states [B, T, D] that `options` ask for."""
    logits, output = ask(teacher, batch["input_ids"], position_ids=batch["position_ids"], **options)
    return logits, output.hidden_states


def divergence(teacher_logits: LogitsOf, keep: Tensor, temperature: float) -> RowLoss:
    """KL(teacher || student) at a temperature, times its square, over the rows that `keep` [N] marks."""

    def of_rows(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        student = (logits / temperature).log_softmax(-1)
        teacher = (teacher_logits(rows).float() / temperature).log_softmax(-1)
        kept, probabilities = keep[rows], teacher.exp()
        loss = teacher.sub_(student).mul_(probabilities).sum(-1)  # [n]
        gradient = student.exp_().sub_(probabilities).mul_((temperature * kept)[:, None])
        return temperature**2 * (loss * kept).sum(), gradient

    return of_rows


def relative_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], keep: Tensor) -> Tensor:
    """Sum over the tokens that `keep` [B, T] marks of the mean over layers of ‖student - teacher‖² / ‖teacher‖²."""
    total = torch.zeros((), device=keep.device)
    for ours, theirs in zip(student, teacher, strict=True):
        wanted = theirs.float()
        size = wanted.square().sum(-1)
        size = size.masked_fill(size == 0, torch.inf)  # an error has no share of nothing
        errors = (ours.float() - wanted).square().sum(-1) / size  # [B, T]
        total = total + (errors * keep).sum()
    return total / len(teacher)
