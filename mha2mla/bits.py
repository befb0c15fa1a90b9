"""One budget of bits for all cached channels: a format chosen on text, and its tables fitted.

Every channel pays one price per bit, whatever layer it is in: bits go where they lower the loss most, and a channel
that gets none is gone. So ranks and bits come out of one rule (reverse water-filling, Cover & Thomas, Elements of
Information Theory, section 10.3.3, with the error that uniform codes are measured to make).

Shapes: N tokens of text, n = r + R channels of a layer, k choices of bits.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mha2mla.channels import Channels, fit_layer, observe
from mha2mla.families import latent_layers
from mha2mla.importance import IMPORTANCE
from mha2mla.modeling.cache_format_mla import LayerFormat, layer_format, run_lengths
from mha2mla.options import RUN, SINKS
from mha2mla.quantization import fit

CHOICES = (0, 1, 2, 3, 4, 6, 8)
RIDGE = 1.0  # of the mean sensitivity, added to all directions that few tokens cannot tell apart


def choose_format(
    model: Any,
    batches: Iterable[torch.Tensor],
    budget: float | None = None,
    bits: int | None = None,
    scales: str = "table",
    residual_length: int = 0,
    importance: str = "fisher",
    turn: bool = True,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Channels]:
    """Give a converted model a cache format, in place, with tables fitted to text.

    batches: input_ids [B, S] without padding.
    budget: bits of a token over all layers, which `importance`, a name of `mha2mla.importance.IMPORTANCE`, shares out;
        or `bits`: of every channel.
    turn: give latents the loss's basis first.
    Returns what was seen of every latent layer.
    Raises ValueError without text, and where latents are not finite.
    """
    clear_format(model)
    batches = list(batches)
    found = observe(model, batches, gradients=bits is None or turn, on_tokens=on_tokens)
    if turn:
        turn_latents(model, found)
    if bits is None:
        assert budget is not None, "choose_format takes a budget or a number of bits"
        chosen = allocate(model, found, budget, IMPORTANCE[importance](model, found, batches), scales)
    else:
        chosen = [[bits] * layer.samples.shape[1] for layer in found]
    set_format(model, chosen, scales, residual_length)
    fit_tables(model, found)
    return found


def clear_format(model: Any) -> None:
    model.config.cache_format = None
    for _, attention in latent_layers(model):
        attention.cache_tables = None


def set_format(model: Any, bits: list[list[int]], scales: str = "table", residual_length: int = 0) -> None:
    """Give a converted model the format with these bits of every latent layer's channels, in place."""
    layers: list[Any] = [None] * model.config.num_hidden_layers
    for (index, _), own in zip(latent_layers(model), bits, strict=True):
        layers[index] = run_lengths(own)
    model.config.cache_format = {
        "scales": scales,
        "sink_length": SINKS,
        "residual_length": residual_length,
        "bits": layers,
    }
    for index, attention in latent_layers(model):
        weight = attention.kv_a_proj_with_mqa.weight
        form = layer_format(model.config, index)
        assert form is not None
        attention.cache_tables = attention.tables_for(form)
        attention.cache_tables.to(weight.device, weight.dtype).train(attention.training)


def fit_tables(model: Any, found: list[Channels]) -> None:
    """Set every layer's tables to what loses least of the channels that were seen."""
    for (_, attention), layer in zip(latent_layers(model), found, strict=True):
        fit_layer(attention.cache_tables, layer)


def refit(model: Any, batches: Iterable[torch.Tensor]) -> None:
    """Fit a format's tables to what the model caches now."""
    fit_tables(model, observe(model, batches, gradients=False))


@torch.no_grad()
def turn_latents(model: Any, found: list[Channels]) -> None:
    """Give every latent the basis in which its channels are uncorrelated and the loss minds all errors alike, in place.

    That is the transform whose codes cost least under the loss's own metric M = E[g gᵀ]: the principal axes of M^½ z
    (transform coding; the projections take it over, so no output changes). The samples are turned too.
    """
    for (_, attention), layer in zip(latent_layers(model), found, strict=True):
        assert layer.fisher is not None
        rank = attention.kv_lora_rank
        metric = layer.fisher[:rank, :rank].double()
        metric += torch.eye(rank, dtype=metric.dtype, device=metric.device) * (RIDGE * metric.diagonal().mean())
        values, vectors = torch.linalg.eigh(metric)
        half, back = ((vectors * values.pow(power)) @ vectors.T for power in (0.5, -0.5))
        centred = layer.samples[:, :rank].double()
        centred = (centred - centred.mean(0)) @ half
        _, axes = torch.linalg.eigh(centred.T @ centred)
        turn, inverse = axes.T.flip(0) @ half, back @ axes.flip(1)
        down, up = attention.kv_a_proj_with_mqa, attention.kv_b_proj
        # Channels as long as they were in the mean: one learning rate has to suit both projections.
        length = down.weight[:rank].double().norm() / (turn @ down.weight[:rank].double()).norm()
        turn, inverse = turn * length, inverse / length
        up.weight.copy_(up.weight.double() @ inverse)
        for own in (down.weight, down.bias):
            if own is not None:
                own[:rank] = (turn @ own[:rank].double()).to(own)
        layer.samples[:, :rank] = (layer.samples[:, :rank].double() @ turn.T).float()
        mixed = torch.block_diag(
            inverse, torch.eye(len(layer.fisher) - rank, dtype=torch.double, device=inverse.device)
        )
        layer.fisher = (mixed.T @ layer.fisher.double() @ mixed).float()


def allocate(
    model: Any, found: list[Channels], budget: float, weights: list[torch.Tensor], scales: str = "table"
) -> list[list[int]]:
    """Bits of every layer's channels, at most `budget` a token over all layers, in runs that fill bytes.

    weights: what an error in each channel counts, [n] of every layer (mha2mla/importance.py).
    Raises ValueError for a budget that leaves nothing.
    """
    costs = []
    for (_, attention), layer, weight in zip(latent_layers(model), found, weights, strict=True):
        errors = torch.stack([fit(layer.samples[:4096], bits)[2] for bits in CHOICES], -1)
        costs.append(of_pairs(errors * weight[:, None], attention))
    low, high = 1e-20, 1e20
    chosen = None
    for _ in range(100):
        price = (low * high) ** 0.5
        bits = [
            at_price(cost, price, attention) for cost, (_, attention) in zip(costs, latent_layers(model), strict=True)
        ]
        forms = [LayerFormat(tuple(own), scales, rope_dim=model.config.rope_dim) for own in bits]
        if sum(8 * form.code_bytes for form in forms) > budget:
            low = price
        else:
            high, chosen = price, bits
    if chosen is None or not any(map(sum, chosen)):
        raise ValueError(f"a budget of {budget:.0f} bits a token over all layers leaves no channel a bit")
    return chosen


def of_pairs(costs: torch.Tensor, attention: Any) -> torch.Tensor:
    """Costs [n, k] with those of a rotated pair's two numbers alike: rotation mixes them."""
    rank = attention.kv_lora_rank
    rotated = costs[rank:].view(attention.num_rope_heads, 2, attention.qk_rope_head_dim // 2, costs.shape[-1])
    return torch.cat((costs[:rank], rotated.mean(1, keepdim=True).expand_as(rotated).flatten(0, 2)))


def at_price(costs: torch.Tensor, price: float, attention: Any) -> list[int]:
    """The bits of a layer's channels that cost least at a price per bit."""
    choices = torch.tensor(CHOICES, dtype=costs.dtype, device=costs.device)
    bits = choices[(costs + price * choices).argmin(-1)]
    rank = attention.kv_lora_rank
    parts = [(bits[:rank], costs[:rank, 0])] if rank else []
    parts += [(bits[rank:], costs[rank:, 0])] if attention.rope_dim else []
    return [int(own) for part in parts for own in in_runs(*part)]


def in_runs(bits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Bits [n] with every run of at least b bits rounded to whole bytes of codes, by weight."""
    order = torch.argsort(
        bits.double() + weight.double() / (weight.double().max() + 1e-300) / 2, descending=True, stable=True
    )
    rounded = torch.zeros_like(bits)
    for least in sorted(set(bits.tolist())):
        count = int((bits >= least).sum())
        count = min(len(bits), (count + RUN // 2) // RUN * RUN) if len(bits) >= RUN else count
        rounded[order[:count]] = least
    return rounded
