"""Packed tokens as absorbed attention reads them: products with their codes, which are never written out as numbers.

Codes are unpacked in pieces that stay in the processor's cache: unpacking them twice, for scores and for sums, takes
less time than writing them down once.

Shapes: B batch, T tokens, n channels of a slot, C columns of their codes (packing_mla.py), Q rows, k factors a token.
"""

from collections.abc import Iterator

import torch

from .cache_format_mla import CacheTables
from .packing_mla import packing

PIECE = {"cpu": 2**21}  # numbers that are unpacked at once
STRETCH = 512  # of tokens of a sequence
LARGE = 2**26  # on devices without such a cache


class Meaning:
    """What the codes of one slot's channels stand for: `middle + weight * (column - its middle)`, summed over a
    channel's columns.

    channels: the slot's, of all that the tables describe; extra: channels behind them that are kept as they are.
    """

    def __init__(self, tables: CacheTables, channels: slice, extra: int = 0) -> None:
        form, device = tables.form, tables.minimum.device
        minimum, scale = (values.detach()[channels] for values in tables.spans(None))
        bits, factors = form.bits[channels], form.factors[channels]
        self.packing = packing(bits, device)
        levels = tables.levels[channels]
        kept = torch.tensor([own == 16 for own in bits], dtype=torch.bool, device=device)
        self.middle = torch.where(kept, 0, minimum + scale * levels / 2)
        self.weight = scale[self.packing.channel] * self.packing.power
        # Channels that are kept as they are.
        self.whole = torch.cat((kept.nonzero()[:, 0], torch.arange(len(bits), len(bits) + extra, device=device)))
        self.channels, self.size = len(bits), len(bits) + extra
        self.factors = max(form.factors, default=-1) + 1
        columns = torch.tensor([factors[own] for own in self.packing.channel.tolist()], dtype=torch.long, device=device)
        self.factor = columns.clamp_min(0)  # of every column
        self.of_factor = torch.nn.functional.one_hot(self.factor, max(1, self.factors)).float()  # [C, k]

    def rows(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [B, Q, n] as they meet columns, [B, Q, C]."""
        return (rows.index_select(-1, self.packing.channel) * self.weight).to(dtype)


class Packed:
    """Tokens of one slot: codes [B, W, T], numbers that are kept [B, T, m], factors [B, k, T] or None."""

    def __init__(
        self, meaning: Meaning, codes: torch.Tensor, kept: torch.Tensor | None, factors: torch.Tensor | None
    ) -> None:
        self.meaning, self.codes, self.kept = meaning, codes, kept
        self.factors = factors if meaning.packing.columns else None

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Sequences, tokens and their columns [b, C, t], times their factors; a piece is overwritten by the next."""
        batch, _, length = self.codes.shape
        packing = self.meaning.packing
        limit = PIECE.get(self.codes.device.type, LARGE) // packing.columns
        size = max(1, min(length, STRETCH, limit // 16 * 16))
        rows = max(1, min(batch, limit // size))
        integers = self.codes.new_empty(rows * packing.columns * size)
        numbers = torch.empty_like(integers, dtype=dtype)
        for row in range(0, batch, rows):
            for start in range(0, length, size):
                some, tokens = slice(row, row + rows), slice(start, start + size)
                codes = self.codes[some, :, tokens]
                shape = codes.shape[0], packing.columns, codes.shape[2]
                count = shape[0] * shape[1] * shape[2]
                columns = numbers[:count].view(shape)  # side by side whatever its size: products would copy it else
                whole = packing.unpack(codes, integers[:count].view(shape))
                if self.factors is None:
                    columns.copy_(whole)
                else:
                    factors = self.factors[some, :, tokens].to(dtype).index_select(1, self.meaning.factor)
                    torch.mul(whole, factors, out=columns)
                yield some, tokens, columns

    def dot(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Products [B, Q, T] of rows [B, Q, n], and what is added to them, [B, Q, T or 1]."""
        meaning, dtype = self.meaning, product_dtype(rows.dtype)
        own = rows[..., : meaning.channels].float()
        weighted = meaning.rows(own, dtype)
        middle = weighted.float() * meaning.packing.middle
        constant = (own @ meaning.middle)[..., None]
        if self.factors is None:
            constant = constant - middle.sum(-1, keepdim=True)
        constant = constant if bias is None else constant + bias
        found = rows.new_empty(*rows.shape[:2], self.codes.shape[2], dtype=dtype)
        constant = constant.to(dtype).expand_as(found)
        if self.factors is not None:
            by_factor = (middle @ meaning.of_factor).to(dtype)
            constant = torch.baddbmm(constant, by_factor, self.factors.to(dtype), alpha=-1)
        if self.kept is not None:
            constant = torch.baddbmm(constant, rows[..., meaning.whole].to(dtype), self.kept.to(dtype).mT)
        if not meaning.packing.columns:
            return constant.to(rows.dtype)
        for some, tokens, columns in self.pieces(dtype):
            found[some, :, tokens] = torch.baddbmm(constant[some, :, tokens], weighted[some], columns)
        return found.to(rows.dtype)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums [B, Q, n] of the tokens with weights [B, Q, T]."""
        meaning, dtype = self.meaning, product_dtype(weights.dtype)
        own = weights.to(dtype)
        total = own.sum(-1, keepdim=True, dtype=torch.float32)
        found = weights.new_zeros(*weights.shape[:2], meaning.size, dtype=torch.float32)
        found[..., : meaning.channels] = total * meaning.middle
        if meaning.packing.columns:
            sums = weights.new_zeros(*weights.shape[:2], meaning.packing.columns, dtype=torch.float32)
            for some, tokens, columns in self.pieces(dtype):
                sums[some] += torch.bmm(own[some, :, tokens], columns.mT)
            if self.factors is not None:
                total = (own @ self.factors.to(dtype).mT).float().index_select(-1, meaning.factor)
            sums -= total * meaning.packing.middle
            found[..., : meaning.channels] += meaning.packing.to_channels(sums * meaning.weight)
        if self.kept is not None:
            found[..., meaning.whole] = (own @ self.kept.to(dtype)).float()
        return found.to(weights.dtype)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products are taken in: half precision cannot hold a code's weight, bfloat16 holds a column's numbers."""
    return torch.float32 if dtype == torch.float16 else dtype
