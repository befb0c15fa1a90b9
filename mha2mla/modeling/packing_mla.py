"""Codes of 1, 2, 3, 4, 6 and 8 bits in bytes, and products with them that never write the numbers they stand for.

Codes are split into parts of 8, 4, 2 or 1 bits, 6 bits as 4 and 2, 3 bits as 2 and 1, and a byte holds parts of one
size: the bytes of a token are those of the 8-bit parts, then of 4, 2 and 1. A part is read by a mask and stays where it
lies in its byte: what it is too large by, a power of two, moves into the weight of its column. So unpacking is one `&`
a size and one conversion, whatever mixture of bits there is. Tokens are side by side in memory, so that these run over
long stretches.

Shapes: n channels, W bytes a token, C columns (one a part and padding), T tokens.
"""

import functools
from collections.abc import Sequence

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
        self.planes: list[tuple[slice, slice, torch.Tensor]] = []  # bytes and columns of a size of parts, and its masks
        power: list[float] = []
        channel, up, low, place_of, byte = (list[int]() for _ in range(5))
        start = 0
        for size in SIZES:
            if not widths[size]:
                continue
            first = len(channel)
            places = range(0, 8, size)
            for number in range(widths[size] * len(places)):
                own, shift = parts[size][number] if number < len(parts[size]) else (-1, 0)
                place = places[number // widths[size]]
                channel.append(own)
                up.append(shift)
                byte.append(start + number % widths[size])
                low.append((2**size - 1) if own >= 0 else 0)
                place_of.append(place)
                power.append(2.0 ** (shift - place))
            masks = torch.tensor([(2**size - 1) << place for place in places], dtype=torch.uint8, device=device)
            here = slice(start, start + widths[size]), slice(first, len(channel))
            self.planes.append((*here, masks[:, None, None]))
            start += widths[size]
        self.columns = len(channel)

        def tensor(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.channel = tensor([max(own, 0) for own in channel], torch.long)  # [C]
        # What a column's number is multiplied by to be its part of a code; 0 for padding.
        self.power = tensor([p * (own >= 0) for p, own in zip(power, channel, strict=True)], torch.float32)
        middles = [(most << place) / 2 for most, place in zip(low, place_of, strict=True)]
        self.middle = tensor(middles, torch.float32)  # of a column's numbers
        self.low, self.up, self.place = (tensor(values, torch.uint8)[:, None] for values in (low, up, place_of))
        self.byte = tensor(byte, torch.long)
        # The columns of every channel's first and second part; the one behind the last where it has none.
        self.first, self.second = (tensor(own, torch.long) for own in columns_of(channel, self.channels))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes [..., W, T] of codes [..., T, n], uint8 below 2^bits."""
        columns = codes.mT.index_select(-2, self.channel)
        columns = columns.bitwise_right_shift_(self.up).bitwise_and_(self.low).bitwise_left_shift_(self.place)
        packed = codes.new_zeros(*columns.shape[:-2], self.width, columns.shape[-1])
        return packed.index_add_(-2, self.byte, columns)  # no two parts share a bit

    def unpack(self, packed: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Columns, whole numbers up to 255, of bytes [..., W, T], written to `found` [..., C, T], uint8."""
        for here, columns, masks in self.planes:
            places = found[..., columns, :].unflatten(-2, (len(masks), -1))
            torch.bitwise_and(packed[..., None, here, :], masks, out=places)
        return found

    def to_channels(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns [..., C], weighted by their powers or what follows from them, added up to channels [..., n]."""
        columns = torch.nn.functional.pad(columns, (0, 1))
        return columns.index_select(-1, self.first) + columns.index_select(-1, self.second)

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes [..., T, n] of bytes [..., W, T], as float32; 0 for channels that have none."""
        columns = packed.new_empty(*packed.shape[:-2], self.columns, packed.shape[-1])
        return self.to_channels(self.unpack(packed, columns).mT * self.power)


@functools.lru_cache(maxsize=1024)
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
    """The columns of every channel's first and second part; the number of columns where it has none."""
    found: list[list[int]] = [[] for _ in range(channels)]
    for column, own in enumerate(channel):
        if own >= 0:
            found[own].append(column)
    filled = [[*own, len(channel), len(channel)] for own in found]
    return [own[0] for own in filled], [own[1] for own in filled]


def packed_bytes(bits: Sequence[int]) -> int:
    """Bytes of a token's codes: every size of parts rounded up."""
    counts = {size: sum(PARTS.get(own, ()).count(size) for own in bits) for size in SIZES}
    return sum(-(-count * size // 8) for size, count in counts.items())
