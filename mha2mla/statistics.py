"""Calibration statistics: second moments of what attention sees, collected in a stream.

Only sums are kept, on the model's own device: O(d²) numbers a layer, whatever the amount of text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from mha2mla.families import attention_layers, geometry_of
from mha2mla.finite import check_activations, check_weights, is_finite, whose_activations
from mha2mla.options import Geometry
from mha2mla.projections import query_and_key
from mha2mla.token_ids import known_ids


@dataclass
class LayerStatistics:
    """Moments of one layer over all calibration tokens, float32.

    input_moment: [d, d], E[x xᵀ] of the attention's input.
    input_mean: [d], E[x].
    query_norm: [H, F], E‖q_{h,f}‖ of each rotary pair before rotation.
    key_norm: [G, F], E‖k_{g,f}‖ likewise.
    query_moment: [H, D, D], E[q qᵀ] before rotation, and key_moment: [F, G, G], E[k_{g,f} · k_{h,f}]; only of normed
        queries and keys, others' follow from the input's.
    """

    input_moment: torch.Tensor
    input_mean: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    query_moment: torch.Tensor | None = None
    key_moment: torch.Tensor | None = None

    @classmethod
    def zeros(cls, geometry: Geometry, device: Any) -> "LayerStatistics":
        d, heads, groups = geometry.hidden_size, geometry.num_heads, geometry.num_kv_heads
        pairs, size = geometry.num_pairs, geometry.head_dim
        shapes = [(d, d), (d,), (heads, pairs), (groups, pairs)]
        if geometry.key_scales:
            shapes += [(heads, size, size), (pairs, groups, groups)]
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    def observe(self, attention: Any, states: torch.Tensor, geometry: Geometry) -> None:
        """Add the attention's inputs [T, d] to the sums."""
        query, key = (part.float() for part in query_and_key(attention, states, geometry))
        x = states.float()
        with torch.autocast(x.device.type, enabled=False):  # the model may run in bfloat16, the sums must not
            self.input_moment += x.T @ x
            self.input_mean += x.sum(0)
            query_pairs, key_pairs = (in_pairs(part, geometry) for part in (query, key))
            self.query_norm += pair_norms(query_pairs)
            self.key_norm += pair_norms(key_pairs)
            if self.query_moment is not None and self.key_moment is not None:
                self.query_moment += torch.einsum("thi,thj->hij", query, query)
                self.key_moment += torch.einsum("tgcf,thcf->fgh", key_pairs, key_pairs)

    def divide(self, tokens: int) -> None:
        """Sums over so many tokens to means."""
        for item in fields(self):
            if getattr(self, item.name) is not None:
                getattr(self, item.name).div_(tokens)

    def check(self, index: int) -> None:
        """ValueError if a moment of layer `index`, whose activations are finite, is not."""
        moments = [getattr(self, item.name) for item in fields(self)]
        if not all(is_finite(moment) for moment in moments if moment is not None):
            raise ValueError(
                f"activations in layer {index}'s attention are finite but too large to square in float32 (beyond about "
                "1e19): no statistics can be made of them; the checkpoint is broken, or not of its configuration"
            )


@dataclass
class Statistics:
    """Statistics of every layer, and the number of tokens they come from."""

    layers: list[LayerStatistics]
    tokens: int


@torch.no_grad()
def collect_statistics(
    model: Any, batches: Iterable[Any], on_tokens: Callable[[int], None] | None = None
) -> Statistics:
    """Run the original model over calibration text and average its attention statistics.

    batches: tensors of input_ids [B, S], or mappings with `input_ids` and, for padded text, `attention_mask`
    [B, S] (0 marks padding, which is not counted). `on_tokens` is told how many tokens each batch had.
    Raises ValueError if there is not a single token, or one that the model does not embed, and where weights or
    activations are not finite.
    """
    check_weights(model.state_dict().items())
    geometry = geometry_of(model.config)
    layers = attention_layers(model)
    device = next(model.parameters()).device
    sums = [LayerStatistics.zeros(geometry, device) for _ in layers]
    kept: list[torch.Tensor] = [torch.empty(0)]  # of the running batch: which of its tokens count, [B * S]

    def observer(total: LayerStatistics) -> Callable[..., None]:
        def hook(attention: Any, inputs: Any, named: Any) -> None:
            states = inputs[0] if inputs else named["hidden_states"]
            total.observe(attention, states.flatten(0, 1)[kept[0]], geometry)

        return hook

    handles = []
    for layer, total in zip(layers, sums, strict=True):
        handles.append(layer.register_forward_pre_hook(observer(total), with_kwargs=True))
    training = model.training
    model.eval()
    tokens = 0
    try:
        for batch in batches:
            batch = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            ids, mask = known_ids(model, ids, mask), torch.ones_like(ids) if mask is None else mask
            kept[0] = mask.flatten().bool().to(device)
            found = int(kept[0].sum())
            run = partial(model.base_model, ids.to(device), attention_mask=mask.to(device), use_cache=False)
            states = run().last_hidden_state.flatten(0, 1)[kept[0]]
            check_activations(states, whose_activations(model.config), model, run)
            tokens += found
            if on_tokens:
                on_tokens(found)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("calibration text is empty: collect_statistics needs at least one batch with one token")
    for index, total in enumerate(sums):
        total.divide(tokens)
        total.check(index)
    return Statistics(sums, tokens)


def in_pairs(rows: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The rotary numbers of queries or keys [T, heads, D] as pairs, [T, heads, 2, F]."""
    return rows[..., : 2 * geometry.num_pairs].unflatten(-1, (2, -1))


def pair_norms(pairs: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the length of every rotary pair: [T, heads, 2, F] to [heads, F]."""
    first, second = pairs.unbind(2)
    # Not torch.norm: over a dimension of two it takes longer than the model's own forward pass.
    return (first.square() + second.square()).sqrt().sum(0)
