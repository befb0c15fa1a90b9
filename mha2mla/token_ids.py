"""Token ids of calibration and held-out text, checked before a model reads them."""

from typing import Any

import torch


def known_ids(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The same input_ids [B, S], with a token that every model has where a mask [B, S] is 0: padding may be any number.

    Raises ValueError for an id that the model does not embed; a lookup would end in an IndexError, or break a GPU.
    """
    ids = ids if mask is None else ids.masked_fill(mask.to(ids.device) == 0, 0)
    size = model.config.get_text_config().vocab_size
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        wrong = ids.max() if ids.max() >= size else ids.min()
        raise ValueError(
            f"token id {int(wrong)} is outside 0..{size - 1}, the tokens that the model embeds: tokenise with the "
            "tokenizer that it was made with, and give padded text with its attention_mask"
        )
    return ids
