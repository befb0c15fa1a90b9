"""One layer's attention fitted to what the original's gave: Adam from the closed form, judged on held-out sequences.

The rate is relative to each weight's root mean square, so that it means the same in families whose weights differ in
scale. What is best still differs between layers, by a factor of eight, and a few steps tell: short tries at rates twice
and half as large go on while they gain.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla.families import attention_layers
from mha2mla.layerwise import surroundings

RATE = 1e-2  # at which the search begins (docs/results/reconstruction_rate.json)
TRY = 8  # steps of a try: its best rate is that of five times as many steps, or within 5 % of its error
TRIES = 6  # rates that are tried in either direction
CHECKS = 4  # times that a fit is judged
HELD_OUT = 8  # one sequence of so many is not fitted on


@dataclass
class LayerFit:
    """Squared error of one layer's attention output relative to it, on sequences that it is not fitted on: of the
    closed form, and of the state that was kept. rate: found by the search, 0.0 where the closed form was kept."""

    before: float
    after: float
    rate: float = 0.0


def fit_attention(
    model: Any,
    index: int,
    inputs: list[torch.Tensor],
    scales: list[torch.Tensor],
    targets: list[torch.Tensor],
    steps: int,
    learning_rate: float,
) -> LayerFit:
    """Fit layer `index` of a converted decoder in place, to the best state that was met, at worst its closed form.

    inputs, targets [1, S, d] of its attention, and the factors [1, S, 1] on their errors; the last are held out.
    """
    attention = attention_layers(model)[index]
    dtype = next(attention.parameters()).dtype
    fitting = Fitting(model, index, inputs, scales, targets)
    if steps:
        rate = fitting.search(min(TRY, steps), learning_rate)
        fitting.descend(steps, rate, CHECKS)
    fitting.finish()
    attention.to(dtype)
    return fitting.found


class Fitting:
    """A layer in float32, the best of its states so far, and how to come to others."""

    def __init__(
        self,
        model: Any,
        index: int,
        inputs: list[torch.Tensor],
        scales: list[torch.Tensor],
        targets: list[torch.Tensor],
    ) -> None:
        self.model, self.index = model, index
        self.attention = attention_layers(model)[index].float()
        self.inputs, self.scales, self.targets = inputs, scales, targets
        self.parameters = list(self.attention.parameters())
        self.sizes = [float(each.detach().square().mean().sqrt()) for each in self.parameters]
        held = -(-len(inputs) // HELD_OUT)
        self.fitted, self.held = range(len(inputs) - held), range(len(inputs) - held, len(inputs))
        self.size = sum(map(self.target_size, range(len(targets)))) / len(targets)
        self.closed, self.best = self.copies(), self.copies()
        error = self.judged()
        self.found = LayerFit(error, error)

    def copies(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def target_size(self, number: int) -> float:
        return float((self.targets[number].float() * self.scales[number]).square().mean())

    def error(self, number: int) -> torch.Tensor:
        """Of sequence `number`, relative to the targets' mean size."""
        states = self.inputs[number].float()  # in training a layer of half precision stands in float32
        output = self.attention(hidden_states=states, **surroundings(self.model, self.index, states))[0]
        difference = (output.float() - self.targets[number].float()) * self.scales[number]
        return difference.square().mean() / self.size

    @torch.no_grad()
    def judged(self) -> float:
        """Mean error of the held-out sequences; infinite where it is no number."""
        torch.clear_autocast_cache()  # it holds the weights in half precision as they were before the last step
        error = sum(float(self.error(number)) for number in self.held) / len(self.held)
        return math.inf if math.isnan(error) else error

    def search(self, steps: int, rate: float) -> float:
        """The rate that comes farthest in so many steps from the closed form; down to one that gains anything."""
        error = self.descend(steps, rate)
        for factor in (2.0, 0.5):
            start = rate
            for _ in range(TRIES):
                restore(self.parameters, self.closed)
                found = self.descend(steps, rate * factor)
                if found >= error and (factor > 1 or self.found.rate):
                    break
                rate, error = rate * factor, min(found, error)
            if rate != start:
                break
        restore(self.parameters, self.best)
        return rate

    def descend(self, steps: int, rate: float, checks: int = 1) -> float:
        """Steps at a rate that falls to zero, one sequence each; the error at the end. The best state is kept."""
        groups = [{"params": [each], "size": size} for each, size in zip(self.parameters, self.sizes, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        error = self.found.after
        for step, number in enumerate(rounds(len(self.fitted), steps), 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"] * (1 - (step - 1) / steps)
            gradients = torch.autograd.grad(self.error(number), self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            torch.clear_autocast_cache()
            if step == steps or step % -(-steps // checks) == 0:
                error = self.judged()
                if error < self.found.after:
                    self.found.after, self.found.rate = error, rate
                    self.best = self.copies()
        return error

    def finish(self) -> None:
        """Leave the layer in its best state, and nothing else of the fit."""
        restore(self.parameters, self.best)
        for parameter in self.parameters:
            parameter.grad = None
        torch.clear_autocast_cache()  # or every layer's would stay until the last is done


@torch.no_grad()
def restore(parameters: list[torch.nn.Parameter], states: list[torch.Tensor]) -> None:
    for parameter, state in zip(parameters, states, strict=True):
        parameter.copy_(state)


def rounds(batches: int, steps: int) -> Iterator[int]:
    """Numbers of batches for so many steps, all of them in a new order every round."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        yield order.pop()
