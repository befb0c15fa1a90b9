"""Layer-wise reconstruction: each converted attention learns to give what the original's gave, before any healing.

Layer after layer, on calibration text: the original's attention output is the target, the input is what the already
converted layers below make of the text, so a layer also learns to live with their errors. Only one layer's states
stand in memory, and a step costs a small part of a step through the whole model: no other layer, no vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla.families import attention_layers, latent_layers
from mha2mla.layerwise import attention_input, embed, pass_layer, surroundings


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
    device, latent = next(student.parameters()).device, dict(latent_layers(converted))
    with torch.no_grad():
        theirs = [embed(teacher, batch.to(device)) for batch in ids]
        ours = [states.clone() for states in theirs]
    fits = []
    for index in range(len(teacher.layers)):
        fit = fit_layer(teacher, student, index, theirs, ours, steps if index in latent else 0, learning_rate)
        fits.append(fit)
        if on_layer:
            on_layer(index, fit)
    return fits


def fit_layer(
    teacher: Any,
    student: Any,
    index: int,
    theirs: list[torch.Tensor],
    ours: list[torch.Tensor],
    steps: int,
    learning_rate: float,
) -> LayerFit:
    """Fit one layer of a converted decoder, then take the states of both decoders [1, S, d] through it in place."""
    _, targets = pass_targets(teacher, index, theirs)
    return fit_to(student, index, ours, targets, steps, learning_rate)


@dataclass
class Targets:
    """What a layer's attention should give for every sequence, and what an error there is divided by."""

    outputs: list[torch.Tensor]
    scales: list[torch.Tensor]

    def give_anything(self) -> bool:
        """Whether there is something to fit: the output of a new block, or of one that was cut, is zero everywhere."""
        pairs = zip(self.outputs, self.scales, strict=True)
        return any(float((output.float() * scale).square().mean()) > 0 for output, scale in pairs)


@torch.no_grad()
def pass_targets(teacher: Any, index: int, states: list[torch.Tensor]) -> tuple[list[torch.Tensor], Targets]:
    """Take the original's states through layer `index` in place; returns its attention's inputs, and its targets."""
    inputs, found = [], Targets([], [])
    for number, before in enumerate(states):
        passed = pass_layer(teacher, index, before)
        # An error matters by its share of the residual stream it is added to: the norm that follows divides by it.
        energy = before.float().square().mean(-1, keepdim=True)
        found.scales.append(torch.where(energy > 0, energy.rsqrt(), 0.0))  # a token that is nothing yet counts nothing
        found.outputs.append(passed.outputs)
        inputs.append(passed.inputs)
        states[number] = passed.states
    return inputs, found


def fit_to(
    student: Any, index: int, states: list[torch.Tensor], targets: Targets, steps: int, learning_rate: float
) -> LayerFit:
    """Fit a converted decoder's layer `index`, then take its states through it in place."""
    with torch.no_grad():
        inputs = [attention_input(student, index, before) for before in states]
    fit = LayerFit(0.0, 0.0)
    if targets.give_anything():
        fit = fit_attention(student, index, inputs, targets.scales, targets.outputs, steps, learning_rate)
    with torch.no_grad():
        for number, before in enumerate(states):
            states[number] = pass_layer(student, index, before).states
    return fit


def fit_attention(
    model: Any,
    index: int,
    inputs: list[torch.Tensor],
    scales: list[torch.Tensor],
    targets: list[torch.Tensor],
    steps: int,
    learning_rate: float,
) -> LayerFit:
    """Adam on one layer's attention, from its closed-form start, with a learning rate that falls to zero."""
    attention = attention_layers(model)[index]
    dtype = next(attention.parameters()).dtype
    attention.float()
    parameters = list(attention.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))
    total = sum(float((target.float() * scale).square().mean()) for target, scale in zip(targets, scales, strict=True))

    def loss(number: int) -> torch.Tensor:
        states = inputs[number].float()  # in training a layer of half precision stands in float32
        output = attention(hidden_states=states, **surroundings(model, index, states))[0]
        error = output.float() - targets[number].float()
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
    after = measured()
    torch.clear_autocast_cache()  # or every layer's would stay until the last is done
    attention.to(dtype)
    return LayerFit(before, after)


def rounds(batches: int, steps: int) -> Iterator[int]:
    """Numbers of batches for so many steps, all of them in a new order every round."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        yield order.pop()
