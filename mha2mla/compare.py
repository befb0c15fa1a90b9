"""How far a converted model is from its original on the same text."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from mha2mla.finite import HALF, check_activations, whose_activations
from mha2mla.output_head import LogitsOf, ask, chunks, losses_of, perplexity_of
from mha2mla.token_ids import known_ids


@dataclass
class Comparison:
    """Perplexities, mean KL divergence of the next-token distributions in nats, and how often the top token agrees."""

    perplexity_original: float
    perplexity_converted: float
    kl_divergence: float
    top_token_agreement: float
    tokens: int


class Tally:
    """Sums over tokens that a comparison is made of."""

    def __init__(self) -> None:
        self.sums, self.tokens = torch.zeros(4, dtype=torch.float64), 0

    def add(self, theirs: LogitsOf, ours: LogitsOf, targets: torch.Tensor) -> None:
        """Logits of both models by rows and the tokens [S], on the original's device, that follow the first S rows."""
        for rows in chunks(len(targets), targets.device):
            wanted = targets[rows]
            place = slice(rows.start, rows.start + len(wanted))
            self.add_rows(theirs(place), ours(place).to(targets.device), wanted)

    def add_rows(self, theirs: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor) -> None:
        theirs, ours = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        sums = (
            losses_of(theirs, targets),
            losses_of(ours, targets),
            functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1),
            ours.argmax(-1) == theirs.argmax(-1),
        )
        self.sums += torch.stack([each.double().sum().cpu() for each in sums])
        self.tokens += len(targets)

    def comparison(self) -> Comparison:
        if not self.tokens:
            raise ValueError("no text to compare the models on: give at least one row of two tokens")
        nll_original, nll_converted, divergence, agreeing = (self.sums / self.tokens).tolist()
        for whose, loss in (("original", nll_original), ("converted model", nll_converted)):
            if not math.isfinite(loss):
                raise ValueError(f"logits of the {whose} are not finite on the held-out text; {HALF}, or get it again")
        original, converted = perplexity_of(nll_original), perplexity_of(nll_converted)
        return Comparison(original, converted, divergence, agreeing, self.tokens)


@torch.no_grad()
def compare(
    original: Any, converted: Any, batches: Iterable[torch.Tensor], on_tokens: Callable[[int], None] | None = None
) -> Comparison:
    """Run both models over batches of input_ids [B, S], one row at a time so that few logits stand in memory.

    `on_tokens` is told how many tokens each row had.
    Raises ValueError if there is no token to predict, or one that the original does not embed, and where logits are not
    finite.
    """
    tally = Tally()
    for batch in batches:
        for row in known_ids(original, batch).split(1):
            theirs, ours = (ask(model, row.to(model.device))[0] for model in (original, converted))
            tally.add(theirs, ours, row[0, 1:].to(original.device))
            if not tally.sums.isfinite().all():
                name_not_finite([original, converted], row)
            if on_tokens:
                on_tokens(row.numel())
    return tally.comparison()


def name_not_finite(models: list[Any], row: torch.Tensor) -> None:
    """ValueError that says which model's logits on a row [1, S] are not finite, and where that begins."""
    for model in models:
        run = partial(model, row.to(model.device), use_cache=False)
        check_activations(run().logits, whose_activations(model.config), model, run)
