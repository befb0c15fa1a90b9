"""Complete groups of tokens in a few bits, in real packed bytes: what `KiviCache` is made of.

KIVI (arXiv 2402.02750, section 3): keys have a few channels that are large for every token, so every channel has a
scale of its own, over a group of tokens. Values have no such channels, so every token has scales of its own, and its
rounding error stays with it. A code c of b bits stands for `minimum + scale * c`, c in 0..2^b - 1; minimum and scale
are kept in float16 beside the codes.

Shapes: B batch, G key/value heads, D head_dim, S tokens in N groups of g; m = g D / share scales a group.
"""

from collections.abc import Callable

import torch

from mha2mla.quantization import largest_divisor, pack, unpack

BITS = (2, 3, 4)
CHUNK = 64  # groups that are quantised at once: it takes many times the memory of their codes


class Groups:
    """Complete groups of one slot: of keys (`by_channel`) or of values.

    share: how many numbers have one scale: the group's tokens for keys, a divisor of D for values.
    """

    def __init__(self, bits: int, group_size: int, head_dim: int, by_channel: bool) -> None:
        self.bits, self.group_size, self.head_dim, self.by_channel = bits, group_size, head_dim, by_channel
        self.share = group_size if by_channel else largest_divisor(head_dim, group_size)
        self.rows: list[torch.Tensor] = []  # codes [B, G, N, bytes], minimum and scale [B, G, N, m]

    @property
    def length(self) -> int:
        return self.rows[0].shape[2] if self.rows else 0

    def append(self, states: torch.Tensor) -> None:
        """Quantise and keep states [B, G, S, D] of complete groups.

        It copies what is kept, once in a group's tokens: little beside dequantising all of it for every token, and no
        memory waits to be used.
        """
        new = [self.quantize(some) for some in states.split(CHUNK * self.group_size, 2)]
        kept = [tuple(self.rows)] if self.rows else []
        self.rows = [torch.cat(rows, 2) for rows in zip(*kept, *new, strict=True)]

    def read(self, dtype: torch.dtype, start: int = 0) -> torch.Tensor:
        """What is kept from group `start` on, [B, G, S, D]."""
        codes, minimum, scale = (rows[:, :, start:] for rows in self.rows)
        return self.dequantize(codes, minimum, scale, dtype)

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """States of complete groups as they would be read back, without keeping them."""
        return self.dequantize(*self.quantize(states), states.dtype)

    def keep(self, start: int, end: int) -> None:
        """Forget all groups but those from `start` to `end`, and free their memory."""
        self.rows = [rows[:, :, start:end].clone() for rows in self.rows]

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.rows = [change(rows) for rows in self.rows]

    @torch.no_grad()
    def quantize(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        limit = torch.finfo(torch.half).max
        shared = self.in_shares(states).float().clamp(-limit, limit)
        minimum = shared.amin(-1).half()
        scale = ((shared.amax(-1) - minimum.float()) / (2**self.bits - 1)).clamp(torch.finfo(torch.half).tiny, limit)
        scale = scale.half()
        codes = ((shared - minimum[..., None].float()) / scale[..., None].float()).round_()
        codes = codes.clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return pack(codes.flatten(-2), self.bits), minimum, scale

    def dequantize(
        self, codes: torch.Tensor, minimum: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        numbers = unpack(codes, self.bits, torch.float32).add_(2 ** (self.bits - 1)).unflatten(-1, (-1, self.share))
        numbers = torch.addcmul(minimum[..., None].float(), numbers, scale[..., None].float())
        return self.in_tokens(numbers).to(dtype)

    def in_shares(self, states: torch.Tensor) -> torch.Tensor:
        """[B, G, N, m, share] from states [B, G, S, D]: the numbers of one scale lie side by side."""
        groups = states.unflatten(2, (-1, self.group_size))
        return groups.mT if self.by_channel else groups.flatten(3).unflatten(3, (-1, self.share))

    def in_tokens(self, shared: torch.Tensor) -> torch.Tensor:
        """States [B, G, S, D]: the inverse of `in_shares`."""
        groups = shared.mT if self.by_channel else shared.flatten(3).unflatten(3, (-1, self.head_dim))
        return groups.flatten(2, 3)


def check_bytes(group_size: int, head_dim: int) -> None:
    """ValueError where the codes of a group do not fill bytes, whatever their bits."""
    if group_size * head_dim % 8:
        raise ValueError(
            f"group_size={group_size}: {group_size} x {head_dim} codes do not fill bytes; choose a multiple of 8"
        )


def group_bytes(bits: int, group_size: int, head_dim: int) -> int:
    """Bytes of one packed group of keys and values of one head: codes, and two float16 numbers a scale."""
    numbers = group_size * head_dim
    scales = head_dim + numbers // largest_divisor(head_dim, group_size)
    return 2 * numbers * bits // 8 + 2 * 2 * scales
