"""Codes of 1, 2, 3, 4, 6 and 8 bits in bytes, and products with them that never write the numbers they stand for.

Codes are split into parts of 8, 4, 2 or 1 bits, 6 bits as 4 and 2, 3 bits as 2 and 1, and a byte holds parts of one
size: the bytes of a token are those of the 8-bit parts, then of 4, 2 and 1. Place k of all bytes that have one is read
by one mask and stays where it lies in its byte: what it is too large by, a power of two, moves into the weight of its
column. So unpacking is one `&` and one conversion a place, whatever mixture of bits there is.

Shapes: n channels, W bytes a token, C columns (one a part and padding), T tokens, Q rows.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
SIZES = (8, 4, 2, 1)


class Packing:
    """Where the codes of channels lie in a token's bytes.

    bits: of every channel. Those of 0 and 16 bits have no codes.
    """

    def __init__(self, bits: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.channels = len(bits)
        parts = {size: parts_of(bits, size) for size in SIZES}
        widths = {size: -(-len(parts[size]) * size // 8) for size in SIZES}
        self.width = sum(widths.values())
        # Bytes that have a place k are all from starts[k] on: parts of fewer bits come later and have more places.
        starts = [sum(widths[size] for size in SIZES if 8 // size <= place) for place in range(8)]
        self.starts = [start for start in starts if start < self.width]
        channel, up, low, power, place_of = [], [], [], [], []
        self.steps: list[slice] = []  # columns of every place
        for place in range(len(self.starts)):
            for size in SIZES:
                for byte in range(widths[size] if 8 // size > place else 0):
                    number = place * widths[size] + byte
                    own, shift = parts[size][number] if number < len(parts[size]) else (-1, 0)
                    channel.append(own)
                    up.append(shift)
                    low.append((2**size - 1) if own >= 0 else 0)
                    power.append(2.0 ** (shift - size * place))
                    place_of.append(size * place)
            self.steps.append(slice(self.steps[-1].stop if self.steps else 0, len(channel)))
        self.columns = len(channel)
        masks = [mask << place for mask, place in zip(low, place_of, strict=True)]

        def tensor(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.channel = tensor([max(own, 0) for own in channel], torch.long)  # [C]
        # What a column's number is multiplied by to be its part of a code; 0 for padding.
        self.power = tensor([p * (own >= 0) for p, own in zip(power, channel, strict=True)], torch.float32)
        self.middle = tensor([mask / 2 for mask in masks], torch.float32)  # of a column's numbers
        self.masks, self.low, self.up, self.place = (tensor(v, torch.uint8) for v in (masks, low, up, place_of))
        firsts, seconds = columns_of(channel, self.channels)
        self.coded = tensor([own for own, column in enumerate(firsts) if column >= 0], torch.long)
        self.first = tensor([column for column in firsts if column >= 0], torch.long)
        double = [own for own, column in enumerate(seconds) if column >= 0]
        self.double = tensor(double, torch.long)
        self.second = tensor([seconds[own] for own in double], torch.long)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [..., W] of codes [..., n], uint8 below 2^bits."""
        packed = codes.new_zeros(*codes.shape[:-1], self.width)
        for start, columns in zip(self.starts, self.steps, strict=True):
            own = codes.index_select(-1, self.channel[columns]) >> self.up[columns]
            packed[..., start:] |= (own & self.low[columns]) << self.place[columns]
        return packed

    def unpack(self, packed: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Columns of bytes [..., W], whole numbers up to 255, written to `found` [..., C]."""
        for start, columns in zip(self.starts, self.steps, strict=True):
            found[..., columns] = packed[..., start:] & self.masks[columns]
        return found

    def to_channels(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns [..., C], weighted by their powers or what follows from them, added up to channels [..., n]."""
        found = columns.new_zeros(*columns.shape[:-1], self.channels)
        found[..., self.coded] = columns[..., self.first]
        if len(self.double):
            found[..., self.double] += columns[..., self.second]
        return found

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes [..., n] of bytes [..., W], as float32; 0 for channels that have none."""
        columns = packed.new_empty(*packed.shape[:-1], self.columns, dtype=torch.float32)
        return self.to_channels(self.unpack(packed, columns) * self.power)


@lru_cache(maxsize=1024)
def packing(bits: tuple[int, ...], device: torch.device) -> Packing:
    return Packing(bits, device)


def parts_of(bits: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Channel and shift of all parts of one size."""
    found = []
    for channel, own in enumerate(bits):
        above = own
        for part in PARTS.get(own, ()):
            above -= part
            if part == size:
                found.append((channel, above))
    return found


def columns_of(channel: list[int], channels: int) -> tuple[list[int], list[int]]:
    """The columns of every channel's first and second part; -1 where it has none."""
    firsts, seconds = [-1] * channels, [-1] * channels
    for column, own in enumerate(channel):
        if own >= 0:
            (firsts if firsts[own] < 0 else seconds)[own] = column
    return firsts, seconds


def packed_bytes(bits: Sequence[int]) -> int:
    """Bytes of a token's codes: every size of parts rounded up."""
    counts = {size: sum(PARTS.get(own, ()).count(size) for own in bits) for size in SIZES}
    return sum(-(-count * size // 8) for size, count in counts.items())
