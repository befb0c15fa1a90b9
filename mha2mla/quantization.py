"""Numbers in a few bits: rounding to integer codes, packing codes into bytes, ranges from calibration.

A code c stands for `low + scale * c`. Ranges belong either to every token and group of channels (measured as the token
comes, stored beside its codes) or to every channel for good (measured on calibration text: they cost nothing a token).

Shapes: n channels, g of them in a group, m = n / g groups.
"""

from dataclasses import dataclass

import torch

BITS = (2, 3, 4, 8)
# The parts that codes are packed in: 3 bits as 2 and 1, so that every byte holds whole parts.
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass
class Range:
    """What codes mean: low and scale, [n] for every channel or [..., m] for every token and group."""

    low: torch.Tensor
    scale: torch.Tensor


def check(bits: int, channels: int, group: int | None, what: str) -> None:
    """ValueError where channels cannot be coded so: unknown bits, parts of bytes, groups that leave some over."""
    if bits not in BITS:
        raise ValueError(f"{what}: {bits} bits are not possible; choose one of {', '.join(map(str, BITS))}")
    per_byte = 8 // min(PARTS[bits])
    if channels % per_byte:
        raise ValueError(f"{what}: {channels} channels of {bits} bits do not fill bytes; a multiple of {per_byte} does")
    if group is not None and (group < 1 or channels % group):
        raise ValueError(f"{what}: groups of {group} do not divide {channels} channels; choose a divisor")


def measure(values: torch.Tensor, bits: int, group: int) -> Range:
    """The range [..., m] of every token's groups, values [..., n], in half precision as it is stored."""
    limit = torch.finfo(torch.half).max
    grouped = values.float().clamp(-limit, limit).unflatten(-1, (-1, group))
    low, high = grouped.amin(-1).half(), grouped.amax(-1)
    scale = ((high - low.float()) / (2**bits - 1)).clamp_min(torch.finfo(torch.half).tiny).half()
    return Range(low, scale)


def encode(values: torch.Tensor, span: Range, bits: int) -> torch.Tensor:
    """Packed codes, uint8 [..., n * bits / 8], of values [..., n]; what lies outside the range is clipped to it."""
    low, scale = spread(span, values.shape[-1])
    return pack(nearest(values.float(), low, scale, bits).to(torch.uint8), bits)


def nearest(values: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes nearest to values, as float32."""
    return ((values - low) / scale).round_().clamp_(0, 2**bits - 1)


def signed(packed: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes as numbers around zero, c - 2^(bits - 1), so that products with them stay as small as they can be."""
    codes = unpack(packed, bits)
    return codes.sub_(2 ** (bits - 1)).view(torch.int8).to(dtype)  # bytes wrap round: 0 - 8 is -8 as int8


class Coded:
    """Coded tokens [B, 1, S, n] as they are attended to: never decoded, their codes unpacked once for all products.

    Ranges of channels move into the other factor. Those of tokens and groups multiply each group's products: rows are
    laid out once a group with zeros elsewhere, so that one matrix product serves all groups.
    """

    def __init__(self, packed: torch.Tensor, span: Range, bits: int, dtype: torch.dtype) -> None:
        self.codes = signed(packed, bits, dtype)[:, 0]  # [B, S, n]
        middle = span.low.float() + span.scale.float() * 2 ** (bits - 1)
        self.of_channels = span.low.dim() == 1
        if self.of_channels:
            self.scale, self.middle = span.scale.to(dtype), middle.to(dtype)
        else:  # [B, m, S], laid out anew: products run along the tokens
            self.scale, self.middle = (each[:, 0].mT.to(dtype).contiguous() for each in (span.scale, middle))

    def dot(self, rows: torch.Tensor) -> torch.Tensor:
        """Products [B, Q, S] with rows [B, Q, n]."""
        if self.of_channels:
            return (rows * self.scale) @ self.codes.mT + (rows @ self.middle)[..., None]
        groups = self.scale.shape[1]
        own = rows.unflatten(-1, (groups, -1)).transpose(1, 2)  # [B, m, Q, g]
        alone = torch.eye(groups, dtype=rows.dtype, device=rows.device)
        blocks = (own[:, :, :, None] * alone[:, None, :, None]).flatten(3).flatten(1, 2)  # [B, m * Q, n]
        found = (blocks @ self.codes.mT).unflatten(1, (groups, -1)) * self.scale[:, :, None]
        return found.sum(1) + own.sum(-1).mT @ self.middle

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums [B, Q, n] of the tokens with weights [B, Q, S]."""
        if self.of_channels:
            return (weights @ self.codes) * self.scale + weights.sum(-1, keepdim=True) * self.middle
        groups = self.scale.shape[1]
        scaled = (weights[:, None] * self.scale[:, :, None]).flatten(1, 2)  # [B, m * Q, S]
        found = (scaled @ self.codes).unflatten(1, (groups, -1)).unflatten(-1, (groups, -1))  # [B, m, Q, m, g]
        own = found.diagonal(dim1=1, dim2=3).permute(0, 1, 3, 2)  # [B, Q, m, g]
        return (own + (weights @ self.middle.mT)[..., None]).flatten(2)


def decode(packed: torch.Tensor, span: Range, bits: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., n] of packed codes."""
    low, scale = spread(span, channels)
    return torch.addcmul(low.to(dtype), unpack(packed, bits).to(dtype), scale.to(dtype))


def spread(span: Range, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """low and scale in float32, one number a channel."""
    low, scale = span.low.float(), span.scale.float()
    if low.shape[-1] == channels:
        return low, scale
    group = channels // low.shape[-1]
    return low.repeat_interleave(group, -1), scale.repeat_interleave(group, -1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., n] below 2^bits into bytes [..., n * bits / 8], part after part.

    A byte holds codes that lie far apart, the first, the middle, …, so that unpacking writes whole runs.
    """
    planes, above = [], bits
    for part in PARTS[bits]:
        above -= part
        runs = ((codes >> above) & (2**part - 1)).unflatten(-1, (8 // part, -1))
        byte = runs[..., 0, :].clone()
        for place in range(1, 8 // part):
            byte |= runs[..., place, :] << (place * part)
        planes.append(byte)
    return torch.cat(planes, -1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    channels = packed.shape[-1] * 8 // bits
    codes: torch.Tensor | None = None
    for part, plane in zip(PARTS[bits], packed.split([channels * part // 8 for part in PARTS[bits]], -1), strict=True):
        mask = 2**part - 1
        found = torch.cat([(plane >> (place * part)) & mask for place in range(8 // part)], -1)
        codes = found if codes is None else (codes << part) | found
    assert codes is not None
    return codes


def fit_channels(samples: torch.Tensor, bits: int, shrinks: int = 12) -> Range:
    """The range [n] of every channel that loses least of samples [N, n], in the mean of squares.

    Candidates are the samples' own range and narrower ones about its middle: a few outliers are better clipped than all
    others rounded coarsely.
    """
    samples = samples.float()
    low, high = samples.amin(0), samples.amax(0)
    middle, half = (low + high) / 2, ((high - low) / 2).clamp_min(1e-8)
    best = torch.full_like(low, torch.inf)
    found = Range(low, half)
    for step in range(shrinks):
        reach = half * (1 - 0.9 * step / shrinks)
        span = Range(middle - reach, 2 * reach / (2**bits - 1))
        codes = nearest(samples, span.low, span.scale, bits)
        error = (span.low + span.scale * codes - samples).square().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        found = Range(torch.where(better, span.low, found.low), torch.where(better, span.scale, found.scale))
    return found
