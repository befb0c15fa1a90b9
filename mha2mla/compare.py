"""How far a converted model is from its original on the same text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from mha2mla.finite import HALF, check_activations, whose_activations


@dataclass
class Comparison:
    """Perplexities, mean KL divergence of the next-token distributions in nats, and how often the top token agrees."""

    perplexity_original: float
    perplexity_converted: float
    kl_divergence: float
    top_token_agreement: float
    tokens: int


class Tally:
    """Sums over rows of logits that a comparison is made of."""

    def __init__(self) -> None:
        self.sums, self.tokens = torch.zeros(4, dtype=torch.float64), 0

    def add(self, theirs: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits [S, V] of both models and the tokens [S] that follow."""
        theirs = theirs.float().log_softmax(-1)
        ours = ours.to(theirs.device).float().log_softmax(-1)
        self.sums += torch.stack(
            (
                functional.nll_loss(theirs, targets, reduction="sum"),
                functional.nll_loss(ours, targets, reduction="sum"),
                functional.kl_div(ours, theirs, reduction="sum", log_target=True),
                (ours.argmax(-1) == theirs.argmax(-1)).sum(),
            )
        ).cpu()
        self.tokens += len(targets)

    def comparison(self) -> Comparison:
        if not self.tokens:
            raise ValueError("no text to compare the models on: give at least one row of two tokens")
        nll_original, nll_converted, divergence, agreeing = (self.sums / self.tokens).tolist()
        for whose, loss in (("original", nll_original), ("converted model", nll_converted)):
            if not math.isfinite(loss):
                raise ValueError(f"logits of the {whose} are not finite on the held-out text; {HALF}, or get it again")
        return Comparison(math.exp(nll_original), math.exp(nll_converted), divergence, agreeing, self.tokens)


@torch.no_grad()
def compare(original: Any, converted: Any, batches: Iterable[torch.Tensor]) -> Comparison:
    """Run both models over batches of input_ids [B, S], one row at a time so that few logits stand in memory.

    Raises ValueError if there is no token to predict, and where logits are not finite.
    """
    tally = Tally()
    for batch in batches:
        for row in batch.split(1):
            theirs = original(row.to(original.device), use_cache=False).logits[0, :-1]
            ours = converted(row.to(converted.device), use_cache=False).logits[0, :-1]
            tally.add(theirs, ours, row[0, 1:].to(original.device))
            if not tally.sums.isfinite().all():
                name_not_finite([original, converted], row)
    return tally.comparison()


def name_not_finite(models: list[Any], row: torch.Tensor) -> None:
    """ValueError that says which model's logits on a row [1, S] are not finite, and where that begins."""
    for model in models:
        run = partial(model, row.to(model.device), use_cache=False)
        check_activations(run().logits, whose_activations(model.config), model, run)
