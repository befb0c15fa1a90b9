"""How far a model is from the original on windows of text: KL divergence, top-1 agreement and its own perplexity."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from eval.generate import NewCache
from eval.perplexity import grouped, padded
from mha2mla.compare import Comparison, Tally, name_not_finite
from mha2mla.output_head import IGNORED, LogitsOf, ask


@torch.inference_mode()
def divergence(
    original: Any,
    model: Any,
    windows: Sequence[torch.Tensor],
    new_cache: NewCache | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare a model with the original over windows, 1-D ids of any lengths ≥ 2, as `perplexity` reads them.

    new_cache: a fresh one for every forward of `model`, through which it then sees its window: what a quantised cache
        would give back. None: the model's own forward, in which one with a cache format quantises by itself.
    on_tokens: is told how many tokens both models have read.
    Raises ValueError where there is no token to predict, and where logits are not finite.
    """
    tally = Tally()
    for group in groups_of(windows, new_cache is not None):
        ids, labels = padded(group)
        targets = labels.flatten()
        kept = (targets != IGNORED).nonzero().flatten()
        through: dict[str, Any] = {"past_key_values": new_cache(model), "use_cache": True} if new_cache else {}
        theirs = ask(original, ids.to(original.device))[0]
        ours = ask(model, ids.to(model.device), **through)[0]
        places = kept.to(original.device)
        tally.add(at(theirs, places), at(ours, kept.to(model.device)), targets.to(places.device)[places])
        if not tally.sums.isfinite().all():
            for window in group:
                name_not_finite([original, model], window[None])
        if on_tokens:
            on_tokens(sum(map(len, group)))
    return tally.comparison()


def at(logits: LogitsOf, places: torch.Tensor) -> LogitsOf:
    """Logits by rows of these places alone."""
    return lambda rows: logits(places[rows])


def groups_of(windows: Sequence[torch.Tensor], alike: bool) -> Iterator[list[torch.Tensor]]:
    """Windows that one forward reads; `alike`: of one length, for padding would be quantised with what is real."""
    if not alike:
        yield from grouped(windows)
        return
    for _, same in groupby(sorted(windows, key=len, reverse=True), key=len):
        yield from grouped(list(same))
