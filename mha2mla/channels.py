"""What a converted model caches on text, channel by channel, and how much its loss minds: what formats are chosen by.

Shapes: S tokens of a sequence, N of all, n = r + R channels of a layer.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla.families import latent_layers
from mha2mla.finite import is_finite
from mha2mla.modeling.attention_mla import rotate
from mha2mla.modeling.cache_format_mla import CacheTables
from mha2mla.options import SINKS
from mha2mla.quantization import fit
from mha2mla.token_ids import known_ids

TOKENS = 8192  # of text that tables are fitted to
GRADIENTS = 4096  # tokens of text that sensitivities come from: they take a backward pass

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Channels:
    """What one layer caches, on text.

    samples: [N, n], rotated keys as their differences from the rotated mean key. key_mean: [heads, P], not rotated.
    fisher: [n, n], E[g gᵀ] of the gradients g of the next-token loss summed over a sequence, or None.
    """

    samples: torch.Tensor
    key_mean: torch.Tensor
    fisher: torch.Tensor | None = None


def observe(
    model: Any,
    batches: Iterable[torch.Tensor],
    gradients: bool = True,
    on_tokens: Callable[[int], None] | None = None,
    objective: str = "loss",
) -> list[Channels]:
    """What every latent layer of a model caches on text, and how much the objective minds: the model's `loss`, or the
    `output` of every layer's own attention."""
    layers = latent_layers(model)
    samples: list[list[torch.Tensor]] = [[] for _ in layers]
    rotations: list[list[Rotation]] = [[] for _ in layers]
    squares: list[Any] = [0.0 for _ in layers]
    seen = learned = 0
    training, model_gradients = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        for ids in (ids for batch in batches for ids in batch.split(1)):
            if seen >= TOKENS:
                break
            wanted = gradients and learned < GRADIENTS
            with recording(layers, wanted) as states, alone(layers, seen, objective == "output") as outputs:
                run(model, ids, wanted, outputs)
            for place, (channels, (cos, sin)) in enumerate(states):
                samples[place].append(channels.detach()[0, 0, SINKS:].float())
                rotations[place].append((cos[0, SINKS:], sin[0, SINKS:]))
                if channels.grad is not None:
                    gradient = channels.grad[0, 0, SINKS:].float()
                    squares[place] = squares[place] + gradient.T @ gradient
            seen += ids.numel()
            learned += wanted * (ids.numel() - SINKS)
            if on_tokens:
                on_tokens(ids.numel())
    finally:
        model.train(training)
        for parameter, before in zip(model.parameters(), model_gradients, strict=True):
            parameter.requires_grad_(before)
    if not seen:
        raise ValueError("calibration text is empty: a cache format is chosen on at least one batch")
    found = []
    for (_, attention), own, turned, square in zip(layers, samples, rotations, squares, strict=True):
        found.append(channels_of(attention, own, turned))
        found[-1].fisher = square / learned if learned else None
        if not is_finite(found[-1].samples):
            raise ValueError("the model's latents are not finite on the calibration text: no code holds them")
    return found


def run(model: Any, ids: torch.Tensor, gradients: bool, outputs: list[torch.Tensor] | None) -> None:
    """One pass over ids [1, S], and where they are wanted gradients: of the next-token loss, or of random projections
    of `outputs`, which the pass fills."""
    ids = known_ids(model, ids).to(model.device)
    with torch.set_grad_enabled(gradients):
        if not gradients:
            model.base_model(input_ids=ids, use_cache=False)
        elif outputs is None:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss * (ids.shape[1] - 1)).backward()
        else:
            model.base_model(input_ids=ids, use_cache=False)
            torch.stack(outputs).sum().backward()


@contextmanager
def alone(layers: list[tuple[int, Any]], seed: int, wanted: bool) -> Iterator[list[torch.Tensor] | None]:
    """Lists a random projection of every layer's attention output, whose gradients stay in the layer."""
    if not wanted:
        yield None
        return
    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor] = []

    def cut_off(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if inputs:  # GPT-NeoX
            return (inputs[0].detach(), *inputs[1:]), named
        return inputs, named | {"hidden_states": named["hidden_states"].detach()}

    def project(_module: Any, _inputs: Any, result: Any) -> None:
        probe = torch.randn(result[0].shape, generator=generator).to(result[0])
        found.append((result[0] * probe).sum())

    hooks = [each.register_forward_pre_hook(cut_off, with_kwargs=True) for _, each in layers]
    hooks += [each.register_forward_hook(project) for _, each in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recording(layers: list[tuple[int, Any]], gradients: bool) -> Iterator[list[tuple[torch.Tensor, Rotation]]]:
    """Lists channels [1, 1, S, n] and rotation of every layer, unquantised, with gradients once there are any."""
    found: list[tuple[torch.Tensor, Rotation]] = []

    def record(attention: Any) -> Callable[..., Any]:
        def quantize(latent: torch.Tensor, k_rot: torch.Tensor, rotation: Rotation, *_: Any) -> Any:
            own, rest = k_rot[..., : attention.rope_dim], k_rot[..., attention.rope_dim :]
            channels = torch.cat((latent, own), -1)
            if gradients:
                channels.requires_grad_(True) if channels.is_leaf else channels.retain_grad()
            found.append((channels, rotation))
            latent, own = channels.split([attention.kv_lora_rank, attention.rope_dim], -1)
            return latent, torch.cat((own, rest), -1)

        return quantize

    for _, attention in layers:
        attention.quantize = record(attention)
    try:
        yield found
    finally:
        for _, attention in layers:
            del attention.quantize


def channels_of(attention: Any, samples: list[torch.Tensor], rotations: list[Rotation]) -> Channels:
    """Samples with rotated keys as differences from their rotated mean."""
    rank, heads, size = attention.kv_lora_rank, attention.num_rope_heads, attention.qk_rope_head_dim
    keys = [own[:, rank:].unflatten(-1, (heads, size)) for own in samples]
    # Not every rotation keeps lengths: YaRN and LongRoPE have a factor on cos and sin.
    lengths = [(cos.square() + sin.square()).float() for cos, sin in rotations]
    still = [
        rotate(key, cos, -sin) / length.repeat(1, 1, 2)
        for key, (cos, sin), length in zip(keys, rotations, lengths, strict=True)
    ]
    mean = torch.cat(still).mean(0)
    differences = [
        torch.cat((own[:, :rank], own[:, rank:] - rotate(mean, cos, sin).flatten(1)), -1)
        for own, (cos, sin) in zip(samples, rotations, strict=True)
    ]
    return Channels(torch.cat(differences), mean)


@torch.no_grad()
def fit_layer(tables: CacheTables, layer: Channels) -> torch.Tensor:
    """Set one layer's tables to what loses least of its samples; the mean squared errors that are left, [n]."""
    tables.key_mean.copy_(layer.key_mean)
    errors = layer.samples.new_zeros(layer.samples.shape[1])
    for bits, channels in tables.form.runs:
        if bits != 16:
            minimum, scale, errors[channels] = fit(layer.samples[:, channels], bits, tables.form.scales)
            tables.minimum[channels], tables.scale[channels] = minimum.to(tables.minimum), scale.to(tables.scale)
    return errors
