"""Sums of a loss over rows of logits, with only a few rows' intermediates in memory at a time.

Logits over a whole vocabulary are the largest tensor of a training step, and a loss written with ordinary operations
keeps several more of that size. Here a loss is a function of a few rows that returns its gradient too; the gradient
is written over the logits it was made from, so they stand in memory once.

Shapes: N rows (tokens), n of them in a chunk, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mha2mla.output_head import chunks

# From the logits [n, V] of a chunk in float32, which it may not change, and its place among the rows:
# the sum of their losses, and its gradient [n, V].
RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def sum_over_rows(logits: Tensor, row_loss: RowLoss) -> Tensor:
    """The sum of `row_loss` over all rows of `logits` [..., V], a float32 scalar.

    With gradients on, the logits are overwritten and worthless afterwards. autograd knows: where an operation before
    or a second backward would still need them, it raises RuntimeError rather than use them. Differentiable once.
    """
    total: Tensor = _SumOverRows.apply(logits, row_loss, torch.is_grad_enabled() and logits.requires_grad)
    return total


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, row_loss: RowLoss, training: bool) -> Tensor:
        logits = logits.detach()  # the same memory and the same count of changes, which is what autograd checks
        rows = logits.view(-1, logits.shape[-1])
        total = torch.zeros((), device=logits.device)
        for place in chunks(len(rows), logits.device):
            loss, gradient = row_loss(rows[place].float(), place)
            total += loss
            if training:
                rows[place] = gradient
        if training:
            ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; `once_differentiable` does not see all such cases
            raise RuntimeError("sum_over_rows is differentiable once: its gradient has no graph")
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale), None, None
