"""Checkpoints, loaded whole or refused."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mha2mla  # noqa: F401  registers the classes of converted models

AGAIN = "make it again with `make convert ARGS=force=true`"
NOT_OURS = "get that checkpoint again"


def load_model(
    folder: Path | str, dtype: torch.dtype | str, remedy: str = AGAIN, revision: str | None = None
) -> PreTrainedModel:
    """A checkpoint (folder or hub id), refused if any weight is missing or the file is cut short."""
    load: Any = AutoModelForCausalLM.from_pretrained  # with its report, or without
    try:
        model, found = load(folder, dtype=dtype, revision=revision or "main", output_loading_info=True)
    except Exception as error:
        raise ValueError(f"{folder} holds no whole checkpoint ({type(error).__name__}: {error}); {remedy}") from error
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise ValueError(f"{folder} lacks {len(found['missing_keys'])} weights ({names}, ...); {remedy}")
    whole: PreTrainedModel = model
    return whole
