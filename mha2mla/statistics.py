"""Calibration statistics: second moments of what attention sees, collected in a stream.

Only sums are kept, on the model's own device: O(d²) numbers a layer, whatever the amount of text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla.families import attention_layers, geometry_of


@dataclass
class LayerStatistics:
    """Moments of one layer over all calibration tokens, float32.

    input_moment: [d, d], E[x xᵀ] of the attention's input.
    input_mean: [d], E[x].
    query_norm: [H, F], E‖q_{h,f}‖ of each rotary pair before rotation.
    key_norm: [G, F], E‖k_{g,f}‖ likewise.
    """

    input_moment: torch.Tensor
    input_mean: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor


@dataclass
class Statistics:
    """Statistics of every layer, and the number of tokens they come from."""

    layers: list[LayerStatistics]
    tokens: int


@torch.no_grad()
def collect_statistics(model: Any, batches: Iterable[Any]) -> Statistics:
    """Run the original model over calibration text and average its attention statistics.

    batches: tensors of input_ids [B, S], or mappings with `input_ids` and, for padded text, `attention_mask`
    [B, S] (0 marks padding, which is not counted). Raises ValueError if there is not a single token.
    """
    geometry = geometry_of(model.config)
    layers = attention_layers(model)
    device = next(model.parameters()).device
    sums = [
        LayerStatistics(
            torch.zeros(geometry.hidden_size, geometry.hidden_size, device=device),
            torch.zeros(geometry.hidden_size, device=device),
            torch.zeros(geometry.num_heads, geometry.num_pairs, device=device),
            torch.zeros(geometry.num_kv_heads, geometry.num_pairs, device=device),
        )
        for _ in layers
    ]
    kept: list[torch.Tensor] = [torch.empty(0)]  # of the running batch: which of its tokens count, [B * S]

    def observe_input(total: LayerStatistics) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any, output: torch.Tensor) -> None:
            x = inputs[0].flatten(0, 1)[kept[0]].float()
            with torch.autocast(x.device.type, enabled=False):  # the model may run in bfloat16, the sums must not
                total.input_moment += x.T @ x
            total.input_mean += x.sum(0)
            total.query_norm += pair_norms(output.flatten(0, 1)[kept[0]], geometry.head_dim)

        return hook

    def observe_key(total: LayerStatistics) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            total.key_norm += pair_norms(output.flatten(0, 1)[kept[0]], geometry.head_dim)

        return hook

    handles = []
    for layer, total in zip(layers, sums, strict=True):
        handles.append(layer.q_proj.register_forward_hook(observe_input(total)))
        handles.append(layer.k_proj.register_forward_hook(observe_key(total)))
    training = model.training
    model.eval()
    tokens = 0
    try:
        for batch in batches:
            batch = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            kept[0] = mask.flatten().bool().to(device)
            tokens += int(kept[0].sum())
            model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("calibration text is empty: collect_statistics needs at least one batch with one token")
    for total in sums:
        for name in ("input_moment", "input_mean", "query_norm", "key_norm"):
            getattr(total, name).div_(tokens)
    return Statistics(sums, tokens)


def pair_norms(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Sum over tokens of the length of every rotary pair: [tokens, heads * D] to [heads, D / 2]."""
    first, second = projected.float().unflatten(-1, (-1, 2, head_dim // 2)).unbind(2)
    # Not torch.norm: over a dimension of two it takes longer than the model's own forward pass.
    return (first.square() + second.square()).sqrt().sum(0)
