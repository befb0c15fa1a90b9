"""Taking: documents by lowest rank until each source's share of the tokens is met, exactly.

Sources are walked together in the order of hashes, so that copies of a text meet, within a source or between
two, and are taken once. The last document of a source is cut so that its share is met to the token, and ended,
if it is no conversation.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from conf.progress import Progress
from data.chats import is_chat, why_refused
from data.documents import shuffled_key
from data.runs import Record, RunWriter
from data.skipped import FileRows, Skipped
from data.workers import Workers

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 1024  # per call of the tokenizer


@dataclass
class Taken:
    """Of one source. `skipped`: conversations that the chat template refuses."""

    tokens: int = 0
    documents: int = 0
    skipped: Skipped = field(default_factory=Skipped)


def allot(total: int, weights: list[float]) -> list[int]:
    """`total` in whole numbers proportional to `weights`, by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def take(
    records: Iterable[Record], wants: list[int], workers: Workers, writer: RunWriter, progress: Progress
) -> list[Taken]:
    """Tokenise records (sorted by key) and write the tokens of those taken; what each source reached.

    ValueError where the chat template refuses more than a few conversations (data/skipped.py).
    """
    taken = [Taken() for _ in wants]
    counted = [FileRows("", each.skipped) for each in taken]
    groups: deque[list[tuple[bytes, list[int], str]]] = deque()

    def wanting(source: int) -> bool:
        return taken[source].tokens < wants[source]

    def batches() -> Iterator[list[str]]:
        batch, size = [], 0
        for key, copies in groupby(records, key=lambda record: record.key):
            first, *others = copies
            sources = [record.source for record in (first, *others) if wanting(record.source)]
            if sources:
                batch.append((key, sources, first.payload.decode()))
                size += len(first.payload)
            elif not any(map(wanting, range(len(wants)))):
                break
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                groups.append(batch)
                yield [text for _, _, text in batch]
                batch, size = [], 0
        if batch:
            groups.append(batch)
            yield [text for _, _, text in batch]

    for rows in workers.tokenise(batches()):
        for (key, sources, text), tokens in zip(groups.popleft(), rows, strict=True):
            # Batches run ahead of this count; a source that is full by now takes nothing.
            source = next(filter(wanting, sources), None)
            if source is not None and len(tokens):
                kept = tokens[: wants[source] - taken[source].tokens]
                if workers.end is not None and not is_chat(text):
                    kept[-1] = workers.end  # where it was cut too
                writer.add(Record(shuffled_key(key), source, kept.tobytes()))
                taken[source].tokens += len(kept)
                taken[source].documents += 1
                counted[source].good += 1
                progress.advance(len(kept))
            elif source is not None and is_chat(text):
                counted[source].leave_bad(why_refused(workers.tokenizer, text))
    for each in counted:
        each.check()
    return taken
