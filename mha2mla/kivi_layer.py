"""One layer of `KiviCache`: which tokens are quantised, which are not, and which a sliding window has forgotten.

Shapes: B batch, G key/value heads, S tokens, D head_dim. Keys (rotated) and values [B, G, S, D].
"""

from collections.abc import Callable
from typing import Any

import torch

from mha2mla.kivi_groups import Groups
from mha2mla.modeling.cache_rows_mla import PackedLayer, check_crop


class KiviLayer(PackedLayer):
    """One layer: the first tokens, complete groups, then the latest tokens.

    A layer with a sliding window forgets a group when its last token leaves the window, and the first tokens together
    with the first group. So it holds up to a group more than the window, and the mask hides that.
    """

    is_croppable = False  # without a trace: an unannounced crop into a packed group leaves its tokens rounded

    def __init__(
        self, bits: int, group_size: int, residual_length: int, sink_length: int, sliding_window: int | None
    ) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.residual_length, self.sink_length = residual_length, sink_length
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.forget()

    def forget(self) -> None:
        self.is_initialized = self.record_past = False
        self.first: list[torch.Tensor] = []  # keys and values, as the two that follow
        self.groups: list[Groups] = []
        self.recent: list[torch.Tensor] = []
        self.dropped = 0  # groups that have left the sliding window

    reset = forget

    def activate_past_recording(self) -> None:
        """Keep new tokens unquantised until the next `crop` says which of them stay (assisted generation).

        Attention still gets what their codes would say; but a token that stays is rounded once, in its final group.
        """
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.groups = [
            Groups(self.bits, self.group_size, key_states.shape[3], by_channel=True),
            Groups(self.bits, self.group_size, value_states.shape[3], by_channel=False),
        ]
        self.first = [states[:, :, :0] for states in (key_states, value_states)]
        self.recent = list(self.first)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; returns all that attention may see, [B, G, S, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = key_states, value_states
        begins = not (self.dropped or self.groups[0].length)
        room = self.sink_length - self.first[0].shape[2] if begins else 0
        self.first = [torch.cat((old, new[:, :, :room]), 2) for old, new in zip(self.first, states, strict=True)]
        self.recent = [torch.cat((old, new[:, :, room:]), 2) for old, new in zip(self.recent, states, strict=True)]
        if not self.record_past:
            self.pack()
        keys, values = (self.read(slot) for slot in (0, 1))
        if not self.record_past:
            self.slide()
        return keys, values

    def read(self, slot: int) -> torch.Tensor:
        """Keys (slot 0) or values (1) as attention gets them, the tokens that a sliding window has left excepted."""
        groups, recent, count = self.groups[slot], self.recent[slot], self.complete()
        parts = [self.first[slot]]
        if groups.length:
            parts.append(groups.read(self.dtype))
        if count:  # only while the past is recorded
            parts.append(groups.rounded(recent[:, :, :count]))
        return torch.cat((*parts, recent[:, :, count:]), 2)

    def complete(self) -> int:
        """How many of the latest tokens fill groups."""
        excess = max(0, self.recent[0].shape[2] - self.residual_length)
        return excess // self.group_size * self.group_size

    def pack(self) -> None:
        if count := self.complete():
            for groups, states in zip(self.groups, self.recent, strict=True):
                groups.append(states[:, :, :count])
            self.recent = [states[:, :, count:].clone() for states in self.recent]  # not views, as in `keep`

    def slide(self) -> None:
        """Forget groups that no later token can see."""
        count = min(self.left(self.get_seq_length()) - self.dropped, self.groups[0].length)
        if count > 0:
            for groups in self.groups:
                groups.keep(count, groups.length)
            self.first = [states[:, :, :0].clone() for states in self.first]
            self.dropped += count

    def left(self, length: int) -> int:
        """How many groups have left the window before a token at position `length`."""
        if self.sliding_window is None:
            return 0
        return max(0, length + 1 - self.sliding_window - self.sink_length) // self.group_size

    @property
    def offset(self) -> int:
        """Position of the first token that is held."""
        return self.sink_length + self.dropped * self.group_size if self.dropped else 0

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        grouped = self.groups[0].length * self.group_size
        return self.offset + self.first[0].shape[2] + grouped + self.recent[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() - self.offset + query_length, self.offset

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number as transformers does.

        Where that leaves a part of a packed group, its tokens stay as they were read and are rounded again when the
        group is complete again; after `activate_past_recording` no group is packed that could be cropped.
        """
        check_crop(tokens_to_remove)
        if not self.is_initialized:
            return
        if tokens_to_remove:
            self.keep(max(0, self.get_seq_length() + tokens_to_remove))
        self.pack()
        self.slide()

    def keep(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if self.left(length) < self.dropped:
            raise ValueError(
                f"crop to {length} tokens: a sliding window of {self.sliding_window} has forgotten what they attend "
                "to; call activate_past_recording() before the tokens to remove are added"
            )
        self.first = [states[:, :, :length].clone() for states in self.first]  # views would keep all tokens alive
        length -= self.offset + self.first[0].shape[2]
        count, rest = divmod(length, self.group_size)
        if count >= self.groups[0].length:
            rest = length - self.groups[0].length * self.group_size
            latest = self.recent
        else:
            latest = [groups.read(self.dtype, count) for groups in self.groups]
            for groups in self.groups:
                groups.keep(0, count)
        self.recent = [states[:, :, :rest].clone() for states in latest]

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.first = [change(states) for states in self.first]
        self.recent = [change(states) for states in self.recent]
        for groups in self.groups:
            groups.change_batch(change)
