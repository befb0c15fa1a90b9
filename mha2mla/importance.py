"""How much an error in a cached channel counts when bits are shared out: a table of rules by name (`mla.importance`).

A rule gets the model, what was seen of its channels and the text, and returns weights [n] for every latent layer: what
an error's square costs. Shapes as in mha2mla/channels.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mha2mla.channels import Channels, fit_layer, observe
from mha2mla.compare import Tally
from mha2mla.families import latent_layers
from mha2mla.modeling.cache_format_mla import LayerFormat
from mha2mla.output_head import ask

PROBED_BITS = 2  # where what errors really cost is measured: as coarse as a small budget makes them
PROBED_TOKENS = 1024  # of the text, for that
PROBED_LENGTH = 512

Batches = list[torch.Tensor]
Weights = list[torch.Tensor]


def fisher(_model: Any, found: list[Channels], _batches: Batches) -> Weights:
    """What the model's loss minds, by its gradients: the diagonal of the Fisher information."""
    return [layer.fisher.diagonal() for layer in found if layer.fisher is not None]


def energy(_model: Any, found: list[Channels], _batches: Batches) -> Weights:
    """All errors alike, so that a channel counts by its variance alone."""
    return [layer.key_mean.new_ones(layer.samples.shape[1]) for layer in found]


def output(model: Any, _found: list[Channels], batches: Batches) -> Weights:
    """What the output of the layer's own attention minds, whatever comes behind it.

    The diagonal of JᵀJ, J the output's Jacobian, by random probes: E[(vᵀJ)²] over v of unit variance (Hutchinson).
    """
    return fisher(model, observe(model, batches, objective="output"), batches)


def measured(model: Any, found: list[Channels], batches: Batches) -> Weights:
    """Fisher's, times how much more a layer's coarse codes really move the output than its gradients say.

    Layer by layer at PROBED_BITS: the KL divergence to the unquantised model against ½ Σ weight · error.
    """
    rows = [row for batch in batches for row in batch[:, :PROBED_LENGTH].split(1)]
    rows = rows[: max(1, PROBED_TOKENS // rows[0].shape[1])]
    expected = [logits_of(model, row) for row in rows]
    weights = fisher(model, found, batches)
    corrected = []
    for (_, attention), layer, weight in zip(latent_layers(model), found, weights, strict=True):
        with coarse(attention, layer) as error:
            tally = Tally()
            for before, row in zip(expected, rows, strict=True):
                tally.add_rows(before, logits_of(model, row), row[0, 1:].to(before.device))
        predicted = float((weight * error).sum()) / 2
        corrected.append(weight * (tally.comparison().kl_divergence / max(predicted, 1e-30)))
    return corrected


@torch.no_grad()
def logits_of(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Logits [S - 1, vocabulary] of a row's [1, S] next tokens."""
    return ask(model, row.to(model.device))[0](slice(0, row.shape[1] - 1))


@contextmanager
def coarse(attention: Any, layer: Channels) -> Iterator[torch.Tensor]:
    """One layer in PROBED_BITS a channel; yields the mean squared errors of its codes, [n]."""
    form = LayerFormat((PROBED_BITS,) * layer.samples.shape[1], rope_dim=attention.rope_dim)
    attention.cache_tables = attention.tables_for(form).to(layer.samples.device)
    try:
        yield fit_layer(attention.cache_tables, layer)
    finally:
        attention.cache_tables = None


IMPORTANCE: dict[str, Callable[[Any, list[Channels], Batches], Weights]] = {
    "fisher": fisher,
    "measured": measured,
    "output": output,
    "energy": energy,
}
