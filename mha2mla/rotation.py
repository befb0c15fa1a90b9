"""A layer's queries and keys, cut into what keeps rotating and what does not.

Two layouts of the rotated key (see MLAAttention): one for every key head (N = G, the heads' own basis and as many
pairs of each), or one that all heads share (N = 1), where a query head's row holds its share of every pair.

Frequency folding (TransMLA, arXiv 2502.07864, section 4.2): the basis mixes key heads and a block of m neighbouring
frequencies, as if these were one. Fewer components carry as much, and turn a little too fast or too slowly.
Shapes as in mha2mla/layer.py.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mha2mla import basis, partial_rope
from mha2mla.options import PER_HEAD, ConversionOptions, Geometry
from mha2mla.partial_rope import Pairs
from mha2mla.statistics import LayerStatistics

NEAR = 16  # tokens; distances that scores mostly look over when a pair is told to stop rotating


@dataclass
class Rotation:
    """A layer's rotary embedding: frequencies [F] in radians a token, all zero in a layer that does not rotate, the
    factor that RoPE scaling puts on cos and sin, and the longest context in tokens."""

    frequencies: torch.Tensor
    scale: float
    context: int

    @cached_property
    def turn(self) -> torch.Tensor:
        """[F], see `Pairs.turn`. Where nothing rotates pairs are kept by their energy alone."""
        if not self.frequencies.any():
            return torch.ones_like(self.frequencies)
        return partial_rope.rotation_loss(self.frequencies, self.context)

    @cached_property
    def near(self) -> torch.Tensor:
        """E[exp(iΔθ)] over near distances, complex [F]."""
        weights = torch.exp(-torch.arange(16 * NEAR, dtype=torch.float64) / NEAR)
        return partial_rope.mean_rotation(self.frequencies, weights)


@dataclass
class Parts:
    """query_rest [H, K, d + 1], query_rotated [H, P, d + 1], key_rest [G, K, d + 1], key_rotated [N * P, d + 1],
    pair_index [N, P / 2]."""

    query_rest: torch.Tensor
    query_rotated: torch.Tensor
    key_rest: torch.Tensor
    key_rotated: torch.Tensor
    pair_index: torch.Tensor


@dataclass
class Choice:
    """Which pairs go on rotating: kept [F, components] of the basis mixing [F, components, key heads]; with frequency
    folding a block of m frequencies counts as one, and a component mixes m times as many."""

    kept: torch.Tensor
    mixing: torch.Tensor


def shares_rotated_key(options: ConversionOptions) -> bool:
    """Whether all heads share one rotated key, as in DeepSeek's models."""
    return options.rope_basis != "heads" or options.partial_rope not in PER_HEAD


def choose_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
    moment: torch.Tensor | None,
) -> Choice:
    """The pairs of queries [H, 2, F, d + 1] and keys [G, 2, F, d + 1] that keep their rotation.

    moment: [d + 1, d + 1] of the layer's input, if it is known.
    """
    assert options.rope_dim is not None
    fold = options.frequency_folding
    blocks = replace(
        geometry,
        num_kv_heads=fold * geometry.num_kv_heads,
        head_dim=geometry.head_dim // fold,
        rotary_dim=2 * geometry.num_pairs // fold,
    )
    pairs = Pairs(blocks, options.rope_dim // 2)
    components = blocks.num_kv_heads
    mixing = basis.STRATEGIES["heads"](query.new_zeros(blocks.num_pairs, components, components))
    if statistics is not None and moment is not None:
        if statistics.key_moment is not None and statistics.query_moment is not None:  # normed: not linear in x
            key_moment = statistics.key_moment
            energy = statistics.query_moment.diagonal(dim1=1, dim2=2)[:, : 2 * geometry.num_pairs]
            query_energy = energy.unflatten(1, (2, -1)).sum(1).T[:, :, None]
        else:
            keys, queries = folded(key, fold).flatten(0, 1), folded(query, fold)
            key_moment = torch.einsum("gcfi,ij,hcfj->fgh", keys, moment, keys)
            query_energy = torch.einsum("hmcfi,ij,hmcfj->fhm", queries, moment, queries)
        query_energy = query_energy.unflatten(1, (geometry.num_kv_heads, -1)).sum(2).flatten(1)
        mixing = basis.STRATEGIES[options.rope_basis](key_moment)
        share = mixing.square()  # [F / m, component, key head and frequency]
        turn = rotation.turn.view(-1, 1, fold).expand(-1, geometry.num_kv_heads, -1).flatten(1)
        pairs.turn = torch.einsum("fjg,fg->fj", share, turn.to(share))
        pairs.key_energy = torch.einsum("fjg,fgh,fjh->fj", mixing, key_moment, mixing)
        pairs.query_energy = torch.einsum("fjg,fg->fj", share, query_energy)
        pairs.key_norm = statistics.key_norm.T
        pairs.query_norm = statistics.query_norm.unflatten(0, (geometry.num_kv_heads, -1)).sum(1).T
    return Choice(partial_rope.STRATEGIES[options.partial_rope](pairs).to(query.device), mixing)


def choose_rotation(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
    moment: torch.Tensor | None,
) -> Parts:
    """Cut query [H, D, d + 1] and key [G, D, d + 1]. moment: [d + 1, d + 1] of the layer's input, if it is known.

    What never rotated, the numbers of a head behind its rotary ones, goes where unrotated pairs go.
    """
    turning = 2 * geometry.num_pairs
    still_query, still_key = query[:, turning:], key[:, turning:]
    query, key = as_pairs(query[:, :turning]), as_pairs(key[:, :turning])  # [heads, 2, F, d + 1]
    choice = choose_pairs(query, key, geometry, options, rotation, statistics, moment)
    rest = query * rotation.scale**2  # what no longer passes through the rotary embedding keeps its factor
    if options.expected_rotation:
        rest = turned(rest, rotation.near)
    if shares_rotated_key(options):
        parts = shared(query, key, rest, choice, options.frequency_folding)
    else:
        parts = per_head(query, key, rest, choice.kept)
    parts.query_rest = torch.cat((parts.query_rest, still_query), dim=1)
    parts.key_rest = torch.cat((parts.key_rest, still_key), dim=1)
    return parts


def per_head(query: torch.Tensor, key: torch.Tensor, rest: torch.Tensor, kept: torch.Tensor) -> Parts:
    """A rotated key for every key head: its rows are taken out of the head, nothing is computed."""
    groups, half = len(key), kept.shape[0]
    chosen = kept.T.nonzero()[:, 1].view(groups, -1)
    others = (~kept.T).nonzero()[:, 1].view(groups, -1)
    rotated, still = torch.cat((chosen, chosen + half), 1), torch.cat((others, others + half), 1)
    times = len(query) // groups
    return Parts(
        query_rest=take(rest.flatten(1, 2), still.repeat_interleave(times, 0)),
        query_rotated=take(query.flatten(1, 2), rotated.repeat_interleave(times, 0)),
        key_rest=take(key.flatten(1, 2), still),
        key_rotated=take(key.flatten(1, 2), rotated).flatten(0, 1),
        pair_index=chosen,
    )


def shared(query: torch.Tensor, key: torch.Tensor, rest: torch.Tensor, choice: Choice, fold: int) -> Parts:
    """One rotated key for all heads: the kept components, and for every query head its share of them."""
    key_rest, key_rotated = shared_key(key, choice, fold)
    query_rotated, pair_index = shares(query, len(key), choice, fold)
    return Parts(rest.flatten(1, 2), query_rotated, key_rest, key_rotated, pair_index[None])


def shared_key(key: torch.Tensor, choice: Choice, fold: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [G, 2, F, n] in the directions that do not rotate, [G, 2 F, n], and the one that does, [P, n]."""
    block, vectors = kept_vectors(choice, fold)
    keys = folded(key, fold)
    still = torch.einsum("fgh,hcfi->gcfi", left_over(choice), keys.flatten(0, 1)).unflatten(0, (len(key), fold))
    rotated = torch.einsum("pgm,gmcpi->cpi", vectors, keys[:, :, :, block])
    return still.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(1, 2), rotated.flatten(0, 1)


def shares(query: torch.Tensor, groups: int, choice: Choice, fold: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries [H, 2, F, n] what meets the shared rotated key, [H, P, n], and the frequencies' numbers [P / 2].

    A component of a block of m frequencies turns with the one that has most of it.
    """
    block, vectors = kept_vectors(choice, fold)
    own = vectors.repeat_interleave(len(query) // groups, 1)  # [P / 2, H, m]
    rotated = torch.einsum("phm,hmcpi->hcpi", own, folded(query, fold)[:, :, :, block])
    return rotated.flatten(1, 2), block * fold + vectors.square().sum(1).argmax(1)


def kept_vectors(choice: Choice, fold: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The block of every kept component [P / 2], and what it is made of, [P / 2, G, m]."""
    block, component = choice.kept.nonzero().unbind(1)
    return block, choice.mixing[block, component].unflatten(1, (-1, fold))


def left_over(choice: Choice) -> torch.Tensor:
    """[F, G, G]: takes the keys of a frequency to their part in the directions that do not rotate; exactly zero if
    there are none."""
    return torch.einsum("fj,fjg,fjh->fgh", (~choice.kept).to(choice.mixing), choice.mixing, choice.mixing)


def folded(rows: torch.Tensor, fold: int) -> torch.Tensor:
    """Pairs [heads, 2, F, n] in blocks of m neighbouring frequencies: [heads, m, 2, F / m, n]."""
    return rows.unflatten(2, (-1, fold)).permute(0, 3, 1, 2, 4)


def turned(query: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Queries [H, 2, F, n] times a mean rotation [F], a rotation and a shrink of every pair.

    E[R(−Δθ)] is the best constant for a pair that stops rotating; here its transpose acts on the query.
    """
    cos, sin = mean.real.to(query)[:, None], mean.imag.to(query)[:, None]
    first, second = query.unbind(1)
    return torch.stack((cos * first - sin * second, cos * second + sin * first), dim=1)


def as_pairs(rows: torch.Tensor) -> torch.Tensor:
    """[heads, D, n] as components of pairs, [heads, 2, F, n]."""
    return rows.unflatten(1, (2, -1))


def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """From rows [heads, D, n] those that index [heads, m] names, head by head: [heads, m, n]."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))
