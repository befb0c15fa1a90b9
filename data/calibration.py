"""A little text of the sample's own sources, for conversion: what it looks at, and what it is measured on.

Nothing is sampled first and no corpus is read through: files are opened in an order that depends on seed and
names, and left as soon as there is enough. A document gives one sequence, from a place in it that its hash
chooses, so that few thousand tokens come from many documents. Calibration reads documents that are held out
under no configuration, `heldout_batches` only such as are held out under this one.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch

from conf.progress import Progress
from conf.schema import Config, SourceConfig, SourceKind
from data.chats import is_chat, why_refused
from data.documents import MOST_HELD_OUT, VALIDATION, Split, unit
from data.skipped import FileRows, Skipped, tell
from data.sources import Part, list_parts, read_texts, written_sources
from data.workers import encode, end_of

Item = TypeVar("Item")

CHARACTERS_PER_TOKEN = 8  # more than enough text for one sequence is cut out before tokenising
SPREAD = 8  # files read side by side


def calibration_batches(
    config: Config,
    tokenizer: Any,
    *,
    tokens: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
) -> Iterator[torch.Tensor]:
    """int64 input_ids `[batch_size, sequence_length]` of training documents; the last batch may be smaller.

    Defaults are those of `config.calibration`; ValueError (at once) if the sources hold less text.
    """
    split = Split.of(config)
    return batches(
        config,
        tokenizer,
        written_sources(config, tokenizer),
        never_held_out,
        split,
        "data for calibration",
        tokens or config.calibration.tokens,
        sequence_length or config.calibration.sequence_length,
        batch_size or config.calibration.batch_size,
    )


def heldout_batches(
    config: Config,
    tokenizer: Any,
    *,
    tokens: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
) -> Iterator[torch.Tensor]:
    """The same of documents held out for validation; by default an eighth of the calibration tokens."""
    split = Split.of(config)
    return batches(
        config,
        tokenizer,
        given_sources(config),
        lambda key: split.place(key)[0] == VALIDATION,
        split,
        "held-out data",
        tokens or max(config.calibration.tokens // 8, config.calibration.sequence_length),
        sequence_length or config.calibration.sequence_length,
        batch_size or config.calibration.batch_size,
    )


def training_texts(config: Config) -> Iterator[str]:
    """Plain texts of the sources, by weight, none of which is held out under any configuration."""
    key = Split(config.data.seed, 0.0).key
    sources = {name: source for name, source in given_sources(config).items() if not source.messages_column}
    streams = {
        name: alternate(list_parts(name, source, config.data.seed), Skipped()) for name, source in sources.items()
    }
    return (text for text in by_weight(streams, sources) if never_held_out(key(text)))


def given_sources(config: Config) -> dict[str, SourceConfig]:
    return {name: source for name, source in config.data.sources.items() if source.kind is not SourceKind.generated}


def never_held_out(key: bytes) -> bool:
    """Whether a document is held out under no configuration."""
    return unit(key) < 1 - MOST_HELD_OUT


def batches(
    config: Config,
    tokenizer: Any,
    sources: dict[str, SourceConfig],
    wanted: Callable[[bytes], bool],
    split: Split,
    what: str,
    tokens: int,
    length: int,
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """Rows of documents whose hash is `wanted`, drawn from the sources in proportion to their weights."""
    end = end_of(tokenizer, config.data.document_end)
    count = -(-tokens // length)
    skipped = {name: Skipped() for name in sources}
    texts = {
        name: alternate(list_parts(name, source, config.data.seed), skipped[name]) for name, source in sources.items()
    }
    streams = {
        name: rows(each, tokenizer, wanted, split, length, end, FileRows("", skipped[name]))
        for name, each in texts.items()
    }
    with Progress(what, count, "sequences") as progress:
        found = [progress.passed(row, 1) for row in islice(by_weight(streams, sources), count)]
    tell(what, {f"data.sources.{name}": each for name, each in skipped.items()})
    if len(found) < count:
        raise ValueError(
            f"too little {what}: {len(found)} sequences of {length} tokens found, {count} wanted; "
            "add text, or lower calibration.tokens or calibration.sequence_length"
        )
    ids = torch.tensor(found, dtype=torch.int64)
    return iter(ids.split(batch_size))


def by_weight(streams: dict[str, Iterator[Item]], sources: dict[str, SourceConfig]) -> Iterator[Item]:
    """Items of all streams: the source that is furthest behind its share is next, one that has no more is left out."""
    open_streams, given = dict(streams), dict.fromkeys(streams, 0)
    while open_streams:
        name = min(open_streams, key=lambda name: (given[name] + 0.5) / sources[name].weight)
        item = next(open_streams[name], None)
        if item is None:
            del open_streams[name]
        else:
            given[name] += 1
            yield item


def alternate(parts: list[Part], skipped: Skipped) -> Iterator[str]:
    """Texts of a few parts in turn, then of the next few."""
    for start in range(0, len(parts), SPREAD):
        streams = deque(read_texts(part, skipped) for part in parts[start : start + SPREAD])
        while streams:
            text = next(streams[0], None)
            if text is None:
                streams.popleft()
            else:
                yield text
                streams.rotate(-1)


def rows(
    texts: Iterator[str],
    tokenizer: Any,
    wanted: Callable[[bytes], bool],
    split: Split,
    length: int,
    end: int | None,
    counted: FileRows,
) -> Iterator[list[int]]:
    """Rows of exactly `length` tokens: one of each long document, several short documents to a row."""
    held: list[int] = []
    seen: set[bytes] = set()
    for text in texts:
        key = split.key(text)
        if not wanted(key) or key in seen:
            continue
        seen.add(key)
        if not is_chat(text):
            room = max(0, len(text) - length * CHARACTERS_PER_TOKEN)
            start = int(unit(key[8:]) * room)
            text = text[start : start + length * CHARACTERS_PER_TOKEN]
        [document] = encode(tokenizer, [text], end)
        if is_chat(text) and not len(document):
            counted.leave_bad(why_refused(tokenizer, text))
        else:
            counted.good += 1
        held += document[:length].tolist()
        while len(held) >= length:
            yield held[:length]
            held = held[length:]
    counted.check()
