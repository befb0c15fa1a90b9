"""Which tokens end an output and which pads a batch: found here for conversations and evaluation alike, as transformers
finds them for a checkpoint, without those that its embedding does not have."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from conf.pretrained import load_config, load_generation_config
from data.tokens import embedded_tokens


def generation_settings(model: str, revision: str | None) -> GenerationConfig:
    """Those that `from_pretrained` gives the model (folder or hub id): its own file's, else its configuration's."""
    stored = load_generation_config(model, revision)
    return stored or GenerationConfig.from_model_config(load_config(model, revision))


def end_tokens(tokenizer: Any, settings: GenerationConfig, config: Any) -> list[int]:
    """Tokens that end an output: those of the generation settings, else of the configuration, and the tokenizer's eos.

    Without those that the model cannot say; empty if there are none.
    """
    stored = settings.eos_token_id
    stored = getattr(config.get_text_config(), "eos_token_id", None) if stored is None else stored
    stored = stored if isinstance(stored, list) else [stored]
    return sorted(known([*stored, tokenizer.eos_token_id], config))


def pad_token(tokenizer: Any, settings: GenerationConfig, config: Any) -> int:
    """The token that fills a batch's rows, always one that the model embeds. It is masked, so any such would do."""
    stored = getattr(config.get_text_config(), "pad_token_id", None)
    wanted = [settings.pad_token_id, stored, tokenizer.pad_token_id]
    return next(iter([*known(wanted, config), *end_tokens(tokenizer, settings, config)]), 0)


def known(tokens: Iterable[int | None], config: Any) -> dict[int, None]:
    """Those that the model embeds, once each and in their order: configurations say None, -1 or more."""
    size = embedded_tokens(config)
    return {token: None for token in tokens if token is not None and 0 <= token < size}


def padded_left(rows: Sequence[Any], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one batch, int64 [B, S], padded in front, and its attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.as_tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids, mask
