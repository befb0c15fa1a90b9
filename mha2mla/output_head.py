"""A model's logits, made for a few tokens at a time from its decoder's output, and the next-token loss they give.

What a family does to its logits (a cap, a factor, a layer more) is in its own forward, so its own forward makes them:
it runs with an answer that is known in place of its decoder.

Shapes: B sequences, T tokens, N = B * T rows, n of them at a time, V vocabulary, D hidden size.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mha2mla.families import FAMILIES

# Rows whose logits over the whole vocabulary stand in memory at once: fewer read the head too often and, on a GPU,
# wait for launches; more take memory for nothing.
ROWS = {"cpu": 128, "cuda": 2048}
IGNORED = -100  # the label of a row whose loss does not count

LogitsOf = Callable[[Any], Tensor]  # of rows, as a slice or int64 [n]: their logits [n, V]


def rows_at_once(device: torch.device) -> int:
    return ROWS.get(device.type, ROWS["cpu"])


def chunks(total: int, device: torch.device) -> Iterator[slice]:
    """`total` rows, a chunk at a time."""
    size = rows_at_once(device)
    return (slice(first, first + size) for first in range(0, total, size))


class Given(nn.Module):
    """In place of a module: its answer, where that is known."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.answer


def runs_apart(model: Any) -> bool:
    """Whether decoder and end of a model can run one after the other: those of a known family, with nothing around.

    Around it are a forward put in place of its class's, as Accelerate does, and sharded weights, which `unshard` tells.
    """
    known = {kind for row in FAMILIES.values() for kind in (row.model_type, row.config_class.model_type)}
    wrapped = "forward" in vars(model) or hasattr(model, "unshard")
    return not wrapped and getattr(getattr(model, "config", None), "model_type", None) in known


def ask(model: Any, ids: Tensor, **inputs: Any) -> tuple[LogitsOf, Any]:
    """Run a model over input_ids [B, T], with a forward's other `inputs`: its logits by rows, and the whole output.

    The logits of a family that is not known, or of a wrapped model, stand in memory all at once.
    """
    inputs = {"use_cache": False} | inputs
    if ids.numel() > rows_at_once(ids.device) and runs_apart(model):
        output = model.base_model(input_ids=ids, **inputs)
        return logits_from(model, output), output
    output = model(input_ids=ids, **inputs)
    return rows_of(output.logits), output


def rows_of(logits: Tensor) -> LogitsOf:
    """Of logits [B, T, V] that are there already."""
    flat = logits.flatten(0, 1)
    return lambda rows: flat[rows]


def logits_from(model: Any, output: Any) -> LogitsOf:
    """The logits that a model of a known family makes of its decoder's output, hidden states [B, T, D]."""
    states = output.last_hidden_state.flatten(0, 1)

    def logits(rows: Any) -> Tensor:
        name, decoder = model.base_model_prefix, model.base_model
        known = states[rows][None]
        setattr(model, name, Given(type(output)(last_hidden_state=known)))
        try:
            found: Tensor = model(inputs_embeds=known, use_cache=False).logits[0]
        finally:
            setattr(model, name, decoder)
        return found

    return logits


def token_losses(logits: LogitsOf, labels: Tensor) -> Tensor:
    """Loss in nats of every row, float32 [N], 0 where its label [N] is IGNORED."""
    losses = torch.zeros(len(labels), device=labels.device)
    kept = (labels != IGNORED).nonzero().flatten()
    for rows in kept.split(rows_at_once(labels.device)):
        losses[rows] = losses_of(logits(rows).float().log_softmax(-1), labels[rows])
    return losses


def losses_of(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """[n] from [n, V] and the tokens [n] that follow."""
    return functional.nll_loss(log_probabilities, targets, reduction="none")


@torch.no_grad()
def next_token_losses(model: Any, ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Tensor:
    """Loss in nats of what follows every token of ids [B, T], float32 [B, T] on the model's device.

    labels: [B, T], what each token's logits should predict, IGNORED where none counts; default: the token after it, and
        nothing after the last. `inputs` are the model's own: position_ids, past_key_values with use_cache, ...
    """
    if labels is None:
        labels = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    logits, _ = ask(model, ids.to(model.device), **inputs)
    return token_losses(logits, labels.to(model.device).flatten()).view(ids.shape)


def perplexity_of(loss: float) -> float:
    """exp of a mean loss: inf where that is too large for a number. ValueError for a loss that is none."""
    if math.isnan(loss):
        raise ValueError(
            "the model's logits are not finite on this text: it has no perplexity; run it in bfloat16 or float32"
        )
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
