"""Layer-wise reconstruction: each converted attention learns to give what the original's gave, before any healing.

Layer after layer, on calibration text: the original's attention output is the target, the input is what the already
converted layers below make of the text, so a layer also learns to live with their errors. Only one layer's states
stand in memory, and a step costs a small part of a step through the whole model: no other layer, no vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class LayerFit:
    """Squared error of one layer's attention output relative to it, on the first batch of text, before and after."""

    before: float
    after: float


def reconstruct(
    original: Any,
    converted: Any,
    batches: Iterable[torch.Tensor],
    steps: int,
    learning_rate: float = 1e-3,
    on_layer: Callable[[int, LayerFit], None] | None = None,
) -> list[LayerFit]:
    """Train the attention weights of `converted` in place; the original and all other weights stay as they are.

    batches: input_ids [B, S] of whole sequences without padding; they are gone through again and again.
    steps: optimiser steps a layer, one sequence each: many small steps do more than few large ones (docs/log.md).
    `on_layer` is told of every finished layer.
    Run it under torch.autocast for speed; weights of half precision are trained in float32 and stored back.
    Raises ValueError without a batch.
    """
    ids = [sequence for batch in batches for sequence in batch.split(1)]
    if not ids:
        raise ValueError("reconstruction needs at least one batch of calibration text")
    teacher, student = original.base_model, converted.base_model
    device = next(student.parameters()).device
    with torch.no_grad():
        theirs = [teacher.embed_tokens(batch.to(device)) for batch in ids]
        ours = [states.clone() for states in theirs]
    fits = []
    for index, (layer, copy) in enumerate(zip(teacher.layers, student.layers, strict=True)):
        with torch.no_grad():
            targets = [attend(layer, teacher, states) for states in theirs]
        fit = fit_attention(copy, student, ours, theirs, targets, steps, learning_rate)
        with torch.no_grad():
            for number, target in enumerate(targets):
                theirs[number] = after_attention(layer, theirs[number], target)
                ours[number] = after_attention(copy, ours[number], attend(copy, student, ours[number]))
        fits.append(fit)
        if on_layer:
            on_layer(index, fit)
    return fits


def fit_attention(
    layer: Any,
    model: Any,
    inputs: list[torch.Tensor],
    residuals: list[torch.Tensor],
    targets: list[torch.Tensor],
    steps: int,
    learning_rate: float,
) -> LayerFit:
    """Adam on one layer's attention, from its closed-form start, with a learning rate that falls to zero."""
    attention, dtype = layer.self_attn, layer.self_attn.o_proj.weight.dtype
    attention.float()
    parameters = list(attention.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))
    # An error matters by its share of the residual stream it is added to: the norm that follows divides by it.
    scales = [residual.float().square().mean(-1, keepdim=True).rsqrt() for residual in residuals]
    total = sum(float((target.float() * scale).square().mean()) for target, scale in zip(targets, scales, strict=True))

    def loss(number: int) -> torch.Tensor:
        error = attend(layer, model, inputs[number]).float() - targets[number].float()
        return (error * scales[number]).square().mean() * (len(targets) / total)

    def measured() -> float:
        with torch.no_grad():
            return float(loss(0))

    before = measured()
    for step, number in enumerate(rounds(len(inputs), steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        value = loss(number)
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        torch.clear_autocast_cache()  # it holds the weights in half precision as they were before the step
    for parameter in parameters:
        parameter.grad = None
    attention.to(dtype)
    return LayerFit(before, measured())


def rounds(batches: int, steps: int) -> Iterator[int]:
    """Numbers of batches for so many steps, all of them in a new order every round."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        yield order.pop()


def attend(layer: Any, model: Any, states: torch.Tensor) -> torch.Tensor:
    """Output of a layer's attention on the residual stream [B, S, d]."""
    positions = torch.arange(states.shape[1], device=states.device)[None]
    # In training a layer of half precision stands in float32.
    normed = layer.input_layernorm(states).to(layer.self_attn.o_proj.weight.dtype)
    rotation = model.rotary_emb(normed, positions)
    return layer.self_attn(normed, position_embeddings=rotation, attention_mask=None)[0]


def after_attention(layer: nn.Module, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The residual stream after the whole layer, given its attention's output."""
    states = states + output.to(states.dtype)
    mlp: Any = layer.mlp
    norm: Any = layer.post_attention_layernorm
    return states + mlp(norm(states))
