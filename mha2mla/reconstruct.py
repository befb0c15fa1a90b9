"""Layer-wise reconstruction: each converted attention learns to give what the original's gave, before any healing.

Layer after layer, on calibration text: the original's attention output is the target, the input is what the already
converted layers below make of the text, so a layer also learns to live with their errors. Only one layer's states
stand in memory, and a step costs a small part of a step through the whole model: no other layer, no vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla.families import latent_layers
from mha2mla.layer_fit import RATE, LayerFit, fit_attention
from mha2mla.layerwise import attention_input, embed, pass_layer


def reconstruct(
    original: Any,
    converted: Any,
    batches: Iterable[torch.Tensor],
    steps: int,
    learning_rate: float = RATE,
    on_layer: Callable[[int, LayerFit], None] | None = None,
) -> list[LayerFit]:
    """Train the attention weights of `converted` in place; the original and all other weights stay as they are.

    batches: input_ids [B, S] of complete sequences without padding; they are gone through again and again, but for
        one of eight, on which every layer is judged: it keeps the best state that it met, at worst its closed form.
    steps: optimiser steps a layer, one sequence each: many small steps do more than few large ones (docs/log.md).
        Before them come some short tries for the rate that suits the layer.
    learning_rate: at which they begin, relative to the root mean square of every weight.
    `on_layer` is told of every finished layer.
    Run it under torch.autocast for speed; weights of half precision are trained in float32 and stored back.
    Raises ValueError with fewer than two sequences.
    """
    ids = [sequence for batch in batches for sequence in batch.split(1)]
    check_sequences(len(ids), steps)
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


def check_sequences(number: int, steps: int) -> None:
    """ValueError unless there is a sequence to fit on and one to judge by."""
    if steps and number < 2:
        raise ValueError(
            "reconstruction fits layers on some sequences of calibration text and judges them on others: it needs "
            f"at least 2, not {number} (calibration.tokens of twice calibration.sequence_length)"
        )


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
