"""Token ids of calibration and held-out text, checked before a model reads them."""

from typing import Any

import torch


def without_negative_pad(settings: Any) -> Any:
    """The same generation settings without a pad of -1, as early Llama checkpoints have: it means that there is none,
    and transformers refuses to save it."""
    if isinstance(pad := getattr(settings, "pad_token_id", None), int) and pad < 0:
        settings.pad_token_id = None
    return settings


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
