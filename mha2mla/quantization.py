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
    codes = ((values.float() - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return pack(codes, bits)


def signed(packed: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes as numbers around zero, c - 2^(bits - 1), so that products with them stay as small as they can be."""
    codes = unpack(packed, bits)
    return codes.sub_(2 ** (bits - 1)).view(torch.int8).to(dtype)  # bytes wrap round: 0 - 8 is -8 as int8


def dot(rows: torch.Tensor, packed: torch.Tensor, span: Range, bits: int) -> torch.Tensor:
    """Products [B, Q, S] of rows [B, Q, n] with coded tokens [B, 1, S, n], which are never decoded.

    Ranges of channels move into the rows; those of tokens and groups multiply each group's products.
    """
    codes, middle = signed(packed, bits, rows.dtype)[:, 0], (span.low.float() + span.scale.float() * 2 ** (bits - 1))
    scale = span.scale.to(rows.dtype)
    if scale.dim() == 1:
        return (rows * scale) @ codes.mT + (rows @ middle.to(rows.dtype))[..., None]
    groups = scale.shape[-1]
    grouped = codes.unflatten(-1, (groups, -1)).permute(0, 2, 3, 1)  # [B, m, g, S]
    own = rows.unflatten(-1, (groups, -1)).transpose(1, 2)  # [B, m, Q, g]
    found = (own @ grouped).mul_(scale[:, 0].transpose(1, 2)[:, :, None]).sum(1)
    return found + own.sum(-1).transpose(1, 2) @ middle[:, 0].to(rows.dtype).mT


def mix(weights: torch.Tensor, packed: torch.Tensor, span: Range, bits: int) -> torch.Tensor:
    """Sums [B, Q, n] of coded tokens [B, 1, S, n] with weights [B, Q, S]."""
    codes, middle = signed(packed, bits, weights.dtype)[:, 0], (span.low.float() + span.scale.float() * 2 ** (bits - 1))
    scale = span.scale.to(weights.dtype)
    if scale.dim() == 1:
        return (weights @ codes) * scale + weights.sum(-1, keepdim=True) * middle.to(weights.dtype)
    groups = scale.shape[-1]
    scaled = weights[:, None] * scale[:, 0].transpose(1, 2)[:, :, None]  # [B, m, Q, S]
    found = scaled @ codes.unflatten(-1, (groups, -1)).transpose(1, 2)  # [B, m, Q, g]
    found = found + (weights @ middle[:, 0].to(weights.dtype)).transpose(1, 2)[..., None]
    return found.transpose(1, 2).flatten(2)


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
        codes = ((samples - span.low) / span.scale).round_().clamp_(0, 2**bits - 1)
        error = (span.low + span.scale * codes - samples).square().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        found = Range(torch.where(better, span.low, found.low), torch.where(better, span.scale, found.scale))
    return found
