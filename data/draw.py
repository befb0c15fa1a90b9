"""Drawing the sample: how much of which source, read, taken by hash, tokenised; short corpora refused.

How many characters make a token is estimated from a few documents of each source. Reading more than needed
changes nothing; where the estimate was too low, the corpus is read again with a wider margin.
"""

import math
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from conf.progress import Progress
from conf.schema import Config, SourceConfig, SourceKind
from data.chats import is_chat, why_refused
from data.documents import TRAIN, VALIDATION, Split, train_tokens, whole_sequences
from data.runs import RunWriter, merge
from data.skipped import Skipped
from data.sources import Part, list_parts, read_texts, written_sources
from data.spill import Reading, certain, spill
from data.take import Taken, allot, take
from data.workers import Workers, encode, end_of

MARGINS = (1.25, 3.0, 10.0, math.inf)  # characters read for each that is expected to be needed
HELD_OUT_MARGIN = 1.6  # times as much held-out text: it is little, and one source makes up for another
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 64, 20_000  # looked at for the estimate; characters of each
SLACK = 4096  # tokens beyond what is needed, since documents are whole


@dataclass(frozen=True)
class Source:
    """One corpus, opened: `ratio` is its estimated characters per token, `whole` as in data/spill.py."""

    name: str
    weight: float
    parts: list[Part]
    ratio: float
    whole: bool
    split: Split


@dataclass
class Drawn:
    """One side of the sample: sorted runs of its documents' tokens, what each source gave, and which fell short.

    `skipped` is what was left out of a source: in reading, for both sides together, and of this side's conversations.
    """

    runs: list[str]
    taken: list[Taken]
    short: list[int]
    skipped: list[Skipped]

    @property
    def tokens(self) -> int:
        return sum(taken.tokens for taken in self.taken)


def open_sources(config: Config, tokenizer: Any) -> list[Source]:
    """List and probe every source; ValueError if one is missing, empty, unreadable, or certainly too small."""
    if not config.data.sources:
        raise ValueError(
            "there is no text to sample: give data.files=[...] for one corpus of local files, data.sources "
            "for a weighted mixture, or data=builtin or data=smollm"
        )
    sources = []
    for name, source in written_sources(config, tokenizer).items():
        print(f"sample: opening data.sources.{name}", flush=True)
        parts = list_parts(name, source, config.data.seed)
        skipped = Skipped()
        texts = islice(chain.from_iterable(read_texts(part, skipped) for part in parts), SAMPLE_DOCUMENTS)
        sample = [text if is_chat(text) else text[:SAMPLE_CHARACTERS] for text in texts]
        if not sample:
            files = sum(len(part.files) for part in parts)
            why = f" ({skipped})" if str(skipped) else ""
            raise ValueError(f"data.sources.{name} is empty: no text in {files} files{why}")
        tokens = sum(map(len, encode(tokenizer, sample, None)))
        if not tokens and is_chat(sample[0]):
            raise ValueError(f"data.sources.{name}: {why_refused(tokenizer, sample[0])}")
        ratio = sum(map(len, sample)) / max(1, tokens)
        split = split_of(config, config.data.sources[name])
        sources.append(Source(name, source.weight, parts, ratio, source.kind is SourceKind.local, split))
    # Files that are not compressed hold at most a token a byte.
    sizes = [sum(part.size or math.inf for part in source.parts) for source in sources]
    wanted = wanted_tokens(config, sources)[TRAIN]
    found = [f"at most {size:,.0f}" if size < want else "" for size, want in zip(sizes, wanted, strict=True)]
    refuse_short(config, sources, wanted, found)
    return sources


def wanted_tokens(config: Config, sources: list[Source]) -> dict[str, list[int]]:
    """Tokens of each source by side; the sum of a side is whole sequences."""
    weights = [source.weight for source in sources]
    held_out = whole_sequences(config.data.validation_tokens, config.data.sequence_length)
    real = [source.weight if source.split.held_out else 0.0 for source in sources]
    return {TRAIN: allot(train_tokens(config), weights), VALIDATION: allot(held_out, real)}


def draw(config: Config, sources: list[Source], tokenizer: Any, work: Path) -> dict[str, Drawn]:
    """Sample both sides into sorted runs under `work`; ValueError if there is too little text."""
    wanted = wanted_tokens(config, sources)
    weights = [source.weight for source in sources]
    margins = [0] * len(sources)
    with Workers(config.data.num_workers, tokenizer, end_of(tokenizer, config.data.document_end)) as workers:
        while True:
            readings = [
                Reading(
                    source.parts,
                    source.whole,
                    source.split,
                    quotas(source, wanted[TRAIN][i], wanted[VALIDATION][i], margins[i]),
                )
                for i, source in enumerate(sources)
            ]
            spill(workers, readings, work / "texts")
            refuse_short(config, sources, wanted[TRAIN], estimates(sources, readings, wanted[TRAIN]))
            taker = Taker(readings, workers, work)
            held_out = taker.take_held_out(wanted[VALIDATION], weights)
            more = [i for i in held_out.short if not readings[i].complete]
            if not more:
                train = taker.take(TRAIN, wanted[TRAIN])
                more = [i for i in train.short if not readings[i].complete]
            if not more:
                break
            for i in more:  # what was read of the others is found on disk
                margins[i] += 1
    found = [f"{taken.tokens:,}" if i in train.short else "" for i, taken in enumerate(train.taken)]
    refuse_short(config, sources, wanted[TRAIN], found)
    refuse_no_sequence(config, train, held_out, sum(wanted[VALIDATION]))
    return {TRAIN: train, VALIDATION: held_out}


def split_of(config: Config, source: SourceConfig) -> Split:
    """What the model itself has said is for training; validation is of real text."""
    return Split(config.data.seed, 0.0) if source.kind is SourceKind.generated else Split.of(config)


def quotas(source: Source, train: int, held_out: int, margin: int) -> dict[str, float]:
    """Characters to read of a source for so many tokens of each side, at one of MARGINS (the last: all there are)."""
    needed = {TRAIN: train, VALIDATION: held_out * HELD_OUT_MARGIN}
    return {side: (tokens + SLACK) * source.ratio * MARGINS[margin] for side, tokens in needed.items()}


def estimates(sources: list[Source], readings: list[Reading], wanted: list[int]) -> list[str]:
    """What clearly too small sources hold, before time is spent on tokenising them."""
    about = [reading.total(TRAIN) / source.ratio for source, reading in zip(sources, readings, strict=True)]
    clear = [reading.complete and 1.5 * about[i] < wanted[i] for i, reading in enumerate(readings)]
    return [f"about {tokens:,.0f}" if short else "" for tokens, short in zip(about, clear, strict=True)]


@dataclass
class Taker:
    """Takes from what was read."""

    readings: list[Reading]
    workers: Workers
    work: Path

    def take(self, side: str, wants: list[int]) -> Drawn:
        runs = merge(path for reading in self.readings for path in reading.runs[side])
        writer = RunWriter(self.work / f"tokens-{side}")
        progress = Progress(f"sample {side}", sum(wants), "tokens")
        taken = take(certain(runs, self.readings), wants, self.workers, writer, progress)
        progress.close()
        short = [i for i, want in enumerate(wants) if taken[i].tokens < want]
        skipped = [Skipped.sum(read.skipped, each.skipped) for read, each in zip(self.readings, taken, strict=True)]
        return Drawn(writer.close(), taken, short, skipped)

    def take_held_out(self, wants: list[int], weights: list[float]) -> Drawn:
        """A source with too few held-out documents gives what it has, and the others make up for it."""
        total = sum(wants)
        while True:
            drawn = self.take(VALIDATION, wants)
            others = [i for i in range(len(wants)) if i not in drawn.short and wants[i]]
            if not drawn.short or not others or any(not self.readings[i].complete for i in drawn.short):
                return drawn
            wants = [taken.tokens if i in drawn.short else 0 for i, taken in enumerate(drawn.taken)]
            for i, share in zip(others, allot(total - sum(wants), [weights[i] for i in others]), strict=True):
                wants[i] = share


def refuse_short(config: Config, sources: list[Source], wanted: list[int], found: list[str]) -> None:
    """ValueError naming each source for which `found` says something, unless data.allow_short."""
    if config.data.allow_short or not any(found):
        return
    lines = [
        f"  data.sources.{source.name} holds {amount} tokens for training, its share is {want:,}"
        for source, want, amount in zip(sources, wanted, found, strict=True)
        if amount
    ]
    raise ValueError(
        "\n".join([f"the corpus is smaller than the budget of {sum(wanted):,} tokens:", *lines])
        + "\nAdd text, lower data.tokens or data.fraction, or take what there is with data.allow_short=true."
    )


def refuse_no_sequence(config: Config, train: Drawn, held_out: Drawn, wanted: int) -> None:
    """ValueError if validation falls short (unless data.allow_short), or a side has not even one sequence."""
    length = config.data.sequence_length
    if held_out.tokens < length or (held_out.tokens < wanted and not config.data.allow_short):
        raise ValueError(
            f"the documents held out for validation hold {held_out.tokens:,} tokens, "
            f"data.validation_tokens={config.data.validation_tokens:,} in sequences of {length:,} are wanted: "
            "add text (more documents, not longer ones), or lower data.validation_tokens or data.sequence_length"
        )
    if train.tokens < length:
        raise ValueError(
            f"the corpus holds {train.tokens:,} tokens for training, not one sequence of "
            f"data.sequence_length={length:,}: add text (more documents, not longer ones) or lower it"
        )
