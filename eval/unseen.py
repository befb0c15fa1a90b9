"""Conversations and code that training does not see, for the distance to the original beside that on the sample's text.

    conversations   of a source of conversations the held-out ones; of what the model has said itself
                    (data/converse.py), all of which is for training, those that the sample left over
    code            of the environment (data/builtin.py)

What is not there is left out: a tokenizer may have no chat template, an environment hardly any code.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from heapq import nlargest
from typing import Any

import torch

from conf.plan import Plan
from conf.schema import Config, SourceConfig, SourceKind
from data.calibration import CHARACTERS_PER_TOKEN, alternate
from data.documents import VALIDATION, Split, train_tokens, unit
from data.skipped import Skipped
from data.sources import as_files, list_parts
from data.take import allot
from data.workers import encode
from eval.perplexity import SHORTEST

MOST = 4096  # left-over conversations looked at
CONVERSATIONS, CODE = "conversations", "code"


def unseen_texts(config: Config, tokenizer: Any, tokens: int) -> dict[str, list[torch.Tensor]]:
    """Windows, 1-D ids of at most `eval.perplexity_sequence_length`, about `tokens` of each text by its name."""
    if not tokens:
        return {}
    room = min(config.eval.perplexity_sequence_length, tokens)
    found = {}
    for name, documents in ((CONVERSATIONS, conversations(config, tokenizer)), (CODE, code(config))):
        windows = list(first_windows(documents, tokenizer, room, tokens))
        if windows:
            found[name] = windows
        else:
            print(f"evaluate: no {name} that training has not seen: not measured", flush=True)
    return found


def first_windows(documents: Iterator[str], tokenizer: Any, room: int, tokens: int) -> Iterator[torch.Tensor]:
    """One window of each document until there are so many tokens; what its template refuses is left out."""
    left = tokens
    for text in documents:
        [document] = encode(tokenizer, [text], None)
        window = document[: min(room, left)]
        if len(window) >= min(SHORTEST, room):
            left -= len(window)
            yield torch.tensor(window, dtype=torch.long)
        if left < min(SHORTEST, room):
            return


def conversations(config: Config, tokenizer: Any) -> Iterator[str]:
    """Those that training does not see, real ones first."""
    if not tokenizer.chat_template:
        return
    sources = config.data.sources
    for name, source in sources.items():
        if source.messages_column:
            yield from held_out(name, source, config)
    for name, source in sources.items():
        if source.kind is SourceKind.generated:
            yield from left_over(name, config, tokenizer)


def held_out(name: str, source: SourceConfig, config: Config) -> Iterator[str]:
    split = Split.of(config)
    return chosen(name, source, config, lambda key: split.place(key)[0] == VALIDATION)


def left_over(name: str, config: Config, tokenizer: Any) -> Iterator[str]:
    """What the model has said beyond the source's share: the sample takes the lowest hashes until that is reached."""
    sources = config.data.sources
    shares = allot(train_tokens(config), [source.weight for source in sources.values()])
    said = Plan(config).converse.require_finished()["metrics"]["tokens"]
    left = said - shares[list(sources).index(name)]
    key = Split(config.data.seed, 0.0).key
    for text in nlargest(MOST, chosen(name, as_files(config, sources[name]), config, lambda _: True), key=key):
        left -= len(encode(tokenizer, [text], None)[0])
        if left < 0:  # the sample's last one, which may be cut
            return
        yield text


def code(config: Config) -> Iterator[str]:
    """Stretches of source files, from a place that a file's hash chooses."""
    source = SourceConfig(kind=SourceKind.builtin, name=CODE)
    trains = any(replace(each, weight=source.weight) == source for each in config.data.sources.values())
    split, length = Split.of(config), config.eval.perplexity_sequence_length * CHARACTERS_PER_TOKEN
    for text in chosen(CODE, source, config, lambda key: not trains or split.place(key)[0] == VALIDATION):
        start = int(unit(split.key(text)[8:]) * max(0, len(text) - length))
        yield text[start : start + length]


def chosen(name: str, source: SourceConfig, config: Config, wanted: Callable[[bytes], bool]) -> Iterator[str]:
    """Texts of a source whose hash is wanted, each once."""
    split, seen = Split.of(config), set()
    for text in alternate(list_parts(name, source, config.data.seed), Skipped()):
        key = split.key(text)
        if wanted(key) and key not in seen:
            seen.add(key)
            yield text
