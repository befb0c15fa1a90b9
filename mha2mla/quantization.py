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


class Coded:
    """Coded tokens [B, 1, S, n] as they are attended to: unpacked once for all products, without their middle.

    A number is `middle + scale * (c - 2^(bits - 1))`. Ranges of channels move into the other factor; those of tokens
    and groups multiply the codes, and the middles are products of their own, as few as there are groups.
    """

    def __init__(self, packed: torch.Tensor, span: Range, bits: int, dtype: torch.dtype) -> None:
        self.codes = unpack(packed, bits, dtype)[:, 0]  # [B, S, n]
        middle = middle_of(span, bits).to(dtype)
        self.scale: torch.Tensor | None = None
        if span.low.dim() == 1:
            self.scale, self.middle = span.scale.to(dtype), middle
        else:
            groups = span.scale.shape[-1]
            self.codes.unflatten(-1, (groups, -1)).mul_(span.scale[:, 0, :, :, None].to(dtype))
            self.middle = middle[:, 0].mT  # [B, m, S]

    def dot(self, rows: torch.Tensor) -> torch.Tensor:
        """Products [B, Q, S] with rows [B, Q, n]."""
        if self.scale is not None:
            return ((rows * self.scale) @ self.codes.mT).add_((rows @ self.middle)[..., None])
        sums = rows.unflatten(-1, (self.middle.shape[1], -1)).sum(-1)
        return (rows @ self.codes.mT).add_(sums @ self.middle)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums [B, Q, n] of the tokens with weights [B, Q, S]."""
        if self.scale is not None:
            return (weights @ self.codes) * self.scale + weights.sum(-1, keepdim=True) * self.middle
        groups = self.middle.shape[1]
        return weights @ self.codes + (weights @ self.middle.mT).repeat_interleave(self.codes.shape[2] // groups, -1)


def decode(packed: torch.Tensor, span: Range, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., n] of packed codes."""
    codes = unpack(packed, bits, dtype)
    middle, scale = spread(Range(middle_of(span, bits), span.scale), codes.shape[-1])
    return torch.addcmul(middle.to(dtype), codes, scale.to(dtype))


def middle_of(span: Range, bits: int) -> torch.Tensor:
    """What the code 2^(bits - 1) stands for."""
    return span.low.float() + span.scale.float() * 2 ** (bits - 1)


def spread(span: Range, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """low and scale in float32, one number a channel."""
    low, scale = span.low.float(), span.scale.float()
    if low.shape[-1] == channels:
        return low, scale
    group = channels // low.shape[-1]
    return low.repeat_interleave(group, -1), scale.repeat_interleave(group, -1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., n] below 2^bits into bytes [..., n * bits / 8], part after part.

    A byte holds codes that lie far apart, the first, the middle, …, so that unpacking writes whole runs. Their highest
    bit is turned over, which makes them signed numbers around zero: shifts alone unpack those.
    """
    planes, above = [], bits
    codes = codes ^ (1 << (bits - 1))
    for part in PARTS[bits]:
        above -= part
        runs = ((codes >> above) & (2**part - 1)).unflatten(-1, (8 // part, -1))
        byte = runs[..., 0, :].clone()
        for place in range(1, 8 // part):
            byte |= runs[..., place, :] << (place * part)
        planes.append(byte)
    return torch.cat(planes, -1)


def unpack(packed: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes as numbers around zero, c - 2^(bits - 1), [..., n]: products with them stay as small as they can be."""
    channels = packed.shape[-1] * 8 // bits
    found = packed.new_empty(*packed.shape[:-1], channels, dtype=dtype)
    planes = packed.split([channels * part // 8 for part in PARTS[bits]], -1)
    for index, (part, plane) in enumerate(zip(PARTS[bits], planes, strict=True)):
        runs = found.unflatten(-1, (8 // part, -1))
        for place in range(8 // part):
            if index == 0:  # the highest part has the sign: shifted up to the byte's end, and down with it
                up, down = 8 - part * (place + 1), 8 - part
                run = plane.view(torch.int8)
                run = run << up if up else run
                runs[..., place, :] = run >> down if down else run
            else:
                runs[..., place, :].mul_(2**part).add_((plane >> (place * part)) & (2**part - 1))
    return found


def fit_channels(samples: torch.Tensor, bits: int, shrinks: int = 12) -> Range:
    """The range [n] of every channel that loses least of samples [N, n], in the mean of squares.

    Candidates are the samples' own range and narrower ones about its middle: a few outliers are better clipped than all
    others rounded coarsely.
    """
    samples = samples.float()
    middle, half = extent(samples)
    return best_range(samples, [(middle, half * (1 - 0.9 * step / shrinks)) for step in range(shrinks)], bits)[0]


def extent(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and half of the range [n] of samples [N, n]."""
    low, high = samples.amin(0), samples.amax(0)
    return (low + high) / 2, ((high - low) / 2).clamp_min(1e-8)


def best_range(
    samples: torch.Tensor, candidates: list[tuple[torch.Tensor, torch.Tensor]], bits: int
) -> tuple[Range, torch.Tensor]:
    """For every channel of samples [N, n] the candidate, as middle and reach [n], whose codes lose least, and what they
    lose in the mean of squares [n]."""
    best = torch.full_like(samples[0], torch.inf)
    found = Range(*candidates[0])
    for middle, reach in candidates:
        span = Range(middle - reach, 2 * reach / (2**bits - 1))
        codes = nearest(samples, span.low, span.scale, bits)
        error = (span.low + span.scale * codes - samples).square().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        found = Range(torch.where(better, span.low, found.low), torch.where(better, span.scale, found.scale))
    return found, best


def largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def fit(samples: torch.Tensor, bits: int, scales: str = "table") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """minimum, scale and mean squared error [n] of the codes that lose least of samples [N, n].

    Candidates: the samples' own range, narrower ones about its middle, since a few outliers are better clipped than all
    others rounded coarsely, and multiples of the standard deviation about the mean.
    """
    mean, spread = samples.mean(0), samples.std(0, unbiased=False).clamp_min(1e-8)
    if bits == 0:
        return mean, torch.ones_like(mean), samples.var(0, unbiased=False)
    middle, half = extent(samples)
    candidates = [(middle, half * (1 - step / 12)) for step in range(12)] if bits > 2 else []
    candidates += [(mean, spread * reach) for reach in (0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.6, 3.0, 3.5, 4.0)]
    if scales == "token":
        candidates = [(mean, spread * 2.5)]  # every token's own factor does the rest
    found, error = best_range(samples, candidates, bits)
    return found.low, found.scale, error
