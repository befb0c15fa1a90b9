"""What a packed cache is made of: rows that grow, where every sequence of a batch starts, and rotations by position.

Shapes: B batch, T cached tokens, S new tokens, F rotary frequencies, N rotated keys of P numbers, R = N * P, Q rows.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from .attention_mla import rotate

STEP = 256  # tokens that a buffer grows by: a decoded token writes itself and copies nothing


class PackedLayer(DynamicLayer):
    """What layers of quantised caches share: all that reorders, repeats or selects the sequences of a batch."""

    @abstractmethod
    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a change of the first dimension to everything that is held."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.change_batch(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change_batch(lambda states: states.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.change_batch(lambda states: states[indices.to(states.device)])

    def offload(self) -> None:
        raise NotImplementedError("a quantised cache is not offloaded: it is small; use offloading=False")

    prefetch = offload


def check_crop(tokens_to_remove: int) -> None:
    """ValueError where the number of tokens to forget is not given as transformers gives it."""
    if tokens_to_remove > 0:
        raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative one")


class Rows:
    """A tensor that grows along one dimension, its tokens, in steps: [B, 1, T, n], or [B, 1, n, T] with `tokens=3`."""

    def __init__(self, tokens: int = 2) -> None:
        self.buffer: torch.Tensor | None = None
        self.length, self.tokens = 0, tokens

    def view(self) -> torch.Tensor:
        assert self.buffer is not None
        return self.buffer.narrow(self.tokens, 0, self.length)

    def append(self, rows: torch.Tensor) -> None:
        needed = self.length + rows.shape[self.tokens]
        if self.buffer is None or needed > self.buffer.shape[self.tokens]:
            shape = list(rows.shape)
            shape[self.tokens] = -(-needed // STEP) * STEP
            larger = rows.new_empty(shape)
            if self.buffer is not None:
                larger.narrow(self.tokens, 0, self.length).copy_(self.view())
            self.buffer = larger
        self.buffer.narrow(self.tokens, self.length, needed - self.length).copy_(rows)
        self.length = needed

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.buffer is not None:
            self.buffer = change(self.buffer)


class Starts:
    """The slot of every sequence's first token, behind its padding on the left.

    aligned: the slot where it is one for all, which costs no look at every slot.
    """

    def __init__(self) -> None:
        self.slots: torch.Tensor | None = None  # [B]
        self.aligned: int | None = 0
        self.least = 0

    def see(self, position_ids: torch.Tensor | None, batch: int, cached: int, new: int) -> bool:
        """Take notice of new tokens' positions [B or 1, S]; whether a sequence starts among them.

        A sequence starts at the last slot whose position is 0: padding may have that too.
        """
        if cached == 0:
            self.slots, self.aligned, self.least = None, 0, 0
        elif new == 1:
            return False
        if position_ids is None:
            return cached == 0
        first = (position_ids == 0).expand(batch, -1)
        places = torch.arange(cached, cached + new, device=first.device)
        found = torch.where(first, places, -1).amax(-1)
        known = found.clamp_min(0) if self.slots is None else torch.where(found < 0, self.slots, found)
        if self.slots is not None and self.slots.equal(known):
            return False
        self.set(known)
        return True

    def set(self, slots: torch.Tensor) -> None:
        self.slots = slots
        self.least, most = int(slots.min()), int(slots.max())
        self.aligned = self.least if self.least == most else None

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.slots is not None:
            self.slots = change(self.slots)
            if self.aligned is None:
                self.set(self.slots)

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Positions of slots start..end, [B, S], or [1, S] where they are those of every row; negative ones are of
        padding."""
        if self.aligned is not None or self.slots is None:
            return torch.arange(start - self.least, end - self.least)[None]
        return torch.arange(start, end, device=self.slots.device) - self.slots[:, None]


class Turns:
    """Cosine and sine of every position's rotation, once for all layers and sequences: what a mean key is turned by."""

    def __init__(self) -> None:
        self.rows = Rows()  # [1, 1, positions, 2 F]

    def see(self, rotation: tuple[torch.Tensor, torch.Tensor], starts: Starts, cached: int, anew: bool) -> None:
        """Take in the rotation [B or 1, S, 2 F] of new tokens, of which one sequence that starts first tells all."""
        cos, sin = rotation
        start, new, size = cached - starts.least, cos.shape[1], cos.shape[-1] // 2
        skipped = max(0, -start)
        if new <= skipped or (not anew and start + new <= self.rows.length):
            return
        row = 0
        if starts.aligned is None and cos.shape[0] > 1:
            assert starts.slots is not None
            row = int(starts.slots.argmin())
        own = torch.cat((cos[row, skipped:, :size], sin[row, skipped:, :size]), -1)
        self.rows.length = start + skipped
        self.rows.append(own[None, None].detach())

    def table(self) -> torch.Tensor:
        """[positions, 2 F]"""
        return self.rows.view()[0, 0]


class MeanKeys:
    """The rotated mean key of every token, by its position: what codes of rotated keys are the difference from."""

    def __init__(self, mean: torch.Tensor, pairs: torch.Tensor, turns: Turns | None) -> None:
        """mean [N, P] before rotation, pairs [N, P / 2]; turns None: it does not rotate."""
        self.mean, self.pairs, self.turns = mean.detach(), pairs, turns
        self.matrix: torch.Tensor | None = None

    def dense(self, starts: Starts, start: int, end: int) -> torch.Tensor:
        """Of slots start..end, [B or 1, 1, S, R]."""
        if self.turns is None:
            return self.mean.flatten()[None, None, None]
        table = self.turns.table()
        rows = table[starts.positions(start, end).clamp(0, len(table) - 1).to(table.device)]  # [B or 1, S, 2 F]
        cos, sin = (half[..., self.pairs] for half in rows.chunk(2, -1))
        return rotate(self.mean, cos, sin).flatten(2)[:, None]

    def dot(self, rows: torch.Tensor, starts: Starts, slots: int) -> torch.Tensor:
        """Products [B, Q, slots or 1] of rows [B, Q, R], in as many multiplications as the model has frequencies."""
        if self.turns is None:
            return (rows @ self.mean.flatten().to(rows.dtype))[..., None]
        table = self.turns.table()[: max(1, slots - starts.least)].to(rows.dtype)
        if self.matrix is None or self.matrix.device != rows.device:
            self.matrix = self.by_frequency(table.shape[1] // 2)
        weights = (rows.float() @ self.matrix).to(rows.dtype)
        products = (weights.flatten(0, 1) @ table.mT).unflatten(0, rows.shape[:2])
        if starts.aligned is not None:
            return nn.functional.pad(products, (slots - products.shape[2], 0))
        places = starts.positions(0, slots).clamp_min(0)
        return products.gather(2, places[:, None].expand(-1, rows.shape[1], -1))

    def by_frequency(self, size: int) -> torch.Tensor:
        """[R, 2 F]: what a row's numbers are to the cosine and the sine of every frequency."""
        first, second = self.mean.float().chunk(2, -1)  # of every pair
        own = nn.functional.one_hot(self.pairs, size).to(first)  # [N, P / 2, F]
        cos, sin = torch.cat((first, second), -1), torch.cat((-second, first), -1)
        own = torch.cat((own, own), 1)
        return torch.cat((cos[..., None] * own, sin[..., None] * own), -1).flatten(0, 1)
