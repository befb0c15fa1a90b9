"""Rank-r factors of the stacked weights W = [W_K (what lost its rotation); W_V].

A strategy takes a `Stack` and returns (down [r, d], up [k + v, r]) with up @ down ≈ W. Those that factor keys and
values together differ only in how an error counts (`JOINT`). Selected with `ConversionOptions.low_rank`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

Factors = tuple[torch.Tensor, torch.Tensor]
RIDGE = 1e-6  # of the mean variance, added to all directions that few calibration tokens cannot tell apart


@dataclass
class Stack:
    """What is factored, and what a strategy may weigh it by. Moments are None where there is no calibration text.

    key: [G, K, d], value: [G, V, d], float32.
    input_moment: [d, d], E[x xᵀ] of what the weights are applied to.
    query_moment: [G, K, K], Σ E[q qᵀ] over the query heads that meet the keys of a group.
    output_gram: [G, V, V], Σ W_Oᵀ W_O over the query heads that mix the values of a group.
    value_weight: λ, how much the values' error counts against the keys', at equal energy.
    """

    key: torch.Tensor
    value: torch.Tensor
    rank: int
    input_moment: torch.Tensor | None = None
    query_moment: torch.Tensor | None = None
    output_gram: torch.Tensor | None = None
    value_weight: float = 1.0

    @property
    def rows(self) -> torch.Tensor:
        """[k + v, d], all keys before all values."""
        return torch.cat((self.key.flatten(0, 1), self.value.flatten(0, 1)))


LowRank = Callable[[Stack], Factors]


def truncated_svd(weight: torch.Tensor, rank: int) -> Factors:
    """Best rank-r factors (down [r, d], up [n, r]) in the Frobenius norm; all singular values stand in `up`."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return vh[:rank].to(weight.dtype), (u[:, :rank] * s[:rank]).to(weight.dtype)


def split(stack: Stack) -> Factors:
    """Keys and values apart, half of the latent each; what one side's full rank leaves over goes to the other."""
    w_key, w_value = stack.key.flatten(0, 1), stack.value.flatten(0, 1)
    key_full, value_full = min(w_key.shape), min(w_value.shape)
    key_rank = max(min(stack.rank // 2, key_full), stack.rank - value_full)
    key_down, key_up = truncated_svd(w_key, key_rank)
    value_down, value_up = truncated_svd(w_value, stack.rank - key_rank)
    return torch.cat((key_down, value_down)), torch.block_diag(key_up, value_up)


class Weights(NamedTuple):
    """How an error counts: ‖L (W − Ŵ) C^½‖ with moment C [d, d] and row weights L [k + v, k + v]; None: alike."""

    moment: torch.Tensor | None
    rows: torch.Tensor | None


def plain(_: Stack) -> Weights:
    """All entries of W alike: one SVD of keys and values (MHA2MLA, arXiv 2502.14837, section 3.2: SVD_joint)."""
    return Weights(None, None)


def activation(stack: Stack) -> Weights:
    """Errors on the activations, E‖(W − Ŵ) x‖² (SVD-LLM, arXiv 2403.07378; CARE, arXiv 2603.17946)."""
    return Weights(stack.input_moment, None)


def balanced(stack: Stack) -> Weights:
    """The same with keys and values at equal energy (TransMLA, arXiv 2502.07864, section 4.3: BKV-PCA)."""
    key, value = stack.key.flatten(0, 1), stack.value.flatten(0, 1)
    identity = torch.eye(len(key), device=key.device), torch.eye(len(value), device=value.device)
    return Weights(stack.input_moment, equalised(key, value, *identity, replace(stack, value_weight=1.0)))


def attention(stack: Stack) -> Weights:
    """Errors weighed by what attention does with each number: keys by the queries that meet them, values by the
    output projection that reads them; then equal energy, and λ on the values."""
    assert stack.query_moment is not None and stack.output_gram is not None
    key, value = stack.key.flatten(0, 1), stack.value.flatten(0, 1)
    key_weight, value_weight = root(stack.query_moment), root(stack.output_gram)
    weights = torch.block_diag(*key_weight), torch.block_diag(*value_weight)
    return Weights(stack.input_moment, equalised(key, value, *weights, stack))


def equalised(
    key: torch.Tensor, value: torch.Tensor, key_weight: torch.Tensor, value_weight: torch.Tensor, stack: Stack
) -> torch.Tensor:
    """Block-diagonal row weights under which keys and values carry the same energy, the values then times λ."""
    assert stack.input_moment is not None
    weights = []
    for rows, weight, factor in ((key, key_weight, 1.0), (value, value_weight, stack.value_weight)):
        energy = ((weight @ rows @ stack.input_moment) * (weight @ rows)).sum()
        weights.append(weight * (factor / energy.clamp_min(1e-30).sqrt()))
    return torch.block_diag(*weights)


def root(moment: torch.Tensor) -> torch.Tensor:
    """Symmetric square roots of positive matrices [..., n, n]."""
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT).to(moment.dtype)


def weighted_svd(rows: torch.Tensor, weights: Weights, rank: int) -> Factors:
    """Factors with the smallest ‖L (W − Ŵ) C^½‖ of rows W [n, d].

    No matrix is inverted that calibration could leave singular: `down` spans the leading left vectors of L W C^½, and
    `up` is the least-squares fit of W x to `down` x, which is optimal under any L. Latents come out uncorrelated.
    """
    assert weights.moment is not None, "convert() refuses strategies that need calibration without any"
    w, (lw, c) = rows.double(), weighed(rows, weights)
    _, vectors = torch.linalg.eigh(lw @ c @ lw.T)
    down = vectors[:, -rank:].flip(1).T @ lw
    # At full rank the rows may depend on each other: directions without energy are left out, not divided by.
    gram = down @ c @ down.T
    up = w @ c @ down.T @ torch.linalg.pinv(gram, rtol=1e-13, hermitian=True)
    # Columns of `up` and rows of `down` equally long, so that one learning rate suits both.
    lengths = down.norm(dim=1), up.norm(dim=0)
    empty = lengths[0] <= 1e-9 * lengths[0].max()
    scale = torch.where(empty, 0.0, lengths[1] / lengths[0].clamp_min(1e-300)).sqrt()[:, None]
    return (down * scale).to(rows.dtype), torch.where(scale.T > 0, up / scale.T, 0.0).to(rows.dtype)


def weighed(rows: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """L W [n, d] and C [d, d] in float64."""
    lw = rows.double() if weights.rows is None else weights.rows.double() @ rows.double()
    if weights.moment is None:
        return lw, torch.eye(rows.shape[1], dtype=lw.dtype, device=lw.device)
    c = weights.moment.double()
    if not c.diagonal().mean() > 0:  # nothing but zeros came in: all directions alike, or the factors would be zero too
        return lw, torch.eye(len(c), dtype=c.dtype, device=c.device)
    return lw, c + torch.eye(len(c), dtype=c.dtype, device=c.device) * (RIDGE * c.diagonal().mean())


def factored(weigh: Callable[[Stack], Weights]) -> LowRank:
    """The strategy that factors keys and values together under these weights."""

    def strategy(stack: Stack) -> Factors:
        weights = weigh(stack)
        if weights == (None, None):
            return truncated_svd(stack.rows, stack.rank)
        return weighted_svd(stack.rows, weights, stack.rank)

    return strategy


JOINT = {"joint": plain, "activation": activation, "balanced": balanced, "attention": attention}
STRATEGIES: dict[str, LowRank] = {name: factored(weigh) for name, weigh in JOINT.items()} | {"split": split}
NEEDS_CALIBRATION = {"activation", "balanced", "attention"}


def energies(stack: Stack, name: str) -> torch.Tensor:
    """Squared singular values of what a strategy of JOINT cuts off at a rank, largest first: [min(k + v, d)]."""
    lw, c = weighed(stack.rows, JOINT[name](stack))
    values = torch.linalg.eigvalsh(lw @ c @ lw.T).flip(0).clamp_min(0)
    return values[: min(lw.shape)]
