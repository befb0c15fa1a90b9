"""From texts to token ids: one place for data, training and evaluation.

A tokenizer may begin every text (with bos, [CLS]) and end it (with eos, [SEP]). A document or prompt begins as the
tokenizer begins it, and never ends with what the tokenizer appends: a model that reads an end has nothing to go on
with, and where documents end is `data.document_end`'s to say. What the tokenizer adds is found by trying it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

PROBES = 1000  # tokens tried as texts, until one stands for itself


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text and nothing else."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # long ones are expected
    return ids


def begun_ids(tokenizer: Any, texts: list[str], ending: int | None = None, **options: Any) -> list[list[int]]:
    """Ids of each text as the beginning of a document or prompt.

    ending: how many ids the tokenizer appends, where that is known. options: of the tokenizer's call.
    """
    if not texts:
        return []
    ending = len(added_ids(tokenizer)[1]) if ending is None else ending
    rows = tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    return [row[: len(row) - ending] for row in rows]


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind every text; ValueError where no text shows it."""
    for text in probes(tokenizer):
        plain, whole = plain_ids(tokenizer, text), tokenizer(text, verbose=False)["input_ids"]
        size = len(plain)
        places = [place for place in range(len(whole) - size + 1) if whole[place : place + size] == plain]
        if plain and len(places) == 1:  # several: a token that the tokenizer adds as well
            return whole[: places[0]], whole[places[0] + size :]
    raise ValueError(
        f"what the tokenizer of {tokenizer.name_or_path} adds to a text cannot be told: it makes no text of its first "
        f"{PROBES} tokens those tokens again; get the model's tokenizer again"
    )


def probes(tokenizer: Any) -> Iterator[str]:
    yield "a"
    yield from (tokenizer.decode([token]) for token in range(min(len(tokenizer), PROBES)))


def embedded_tokens(config: Any) -> int:
    """Rows of the embedding of a model with this configuration: ids below are tokens that it knows."""
    return int(config.get_text_config().vocab_size)


def check_ids(what: str, rows: Iterable[Any], tokenizer: Any, config: Any) -> None:
    """ValueError if rows (lists, arrays or tensors of ids) hold a token that a model of `config` does not embed.

    config: None where no model is at hand, so that nothing can be checked.
    """
    if config is None:
        return
    size = embedded_tokens(config)
    largest = max((int(np.asarray(row).max()) for row in rows if len(row)), default=-1)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{what}: token {largest} ({token!r}) of the tokenizer is not among the {size} that the model embeds "
            f"(the tokenizer has {len(tokenizer)}); use the tokenizer that the model was made with, or save the model "
            f"with model.resize_token_embeddings({len(tokenizer)})"
        )
