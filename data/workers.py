"""Processes that read and tokenise, with results in the order of the work whatever their number.

`num_workers=1` starts none. Processes are spawned, not forked: the tokenizer and Arrow hold threads.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from conf.schema import DocumentEnd
from data.chats import chat_tokens, is_chat
from data.tokens import begun_ids

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A context manager around `count` processes that hold the tokenizer. end: the token behind every document."""

    def __init__(self, count: int, tokenizer: Any, end: int | None):
        self.tokenizer, self.end = tokenizer, end
        self.count = count
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.count > 1:
            context = get_context("spawn")
            self.pool = ProcessPoolExecutor(
                self.count, context, initializer=_start, initargs=(self.tokenizer, self.end)
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[..., Result], items: Iterable[Item], waiting: Callable[[], None] | None = None
    ) -> Iterator[Result]:
        """`map` in order, with only a few items in flight: `items` may be a generator that reacts to results.

        `waiting` is called now and then until a result is there; without processes by the function, as its second
        argument.
        """
        if self.pool is None:
            yield from (function(item, waiting) if waiting else function(item) for item in items)
            return

        def result(future: Future[Result]) -> Result:
            while waiting and not wait([future], timeout=1).done:
                waiting()
            return future.result()

        flying: deque[Future[Result]] = deque()
        for item in items:
            flying.append(self.pool.submit(function, item))
            if len(flying) >= 2 * self.count:
                yield result(flying.popleft())
        while flying:
            yield result(flying.popleft())

    def tokenise(self, batches: Iterable[list[str]]) -> Iterator[list[np.ndarray]]:
        """int32 tokens of each text of each batch."""
        if self.pool is None:
            return (encode(self.tokenizer, batch, self.end) for batch in batches)
        return self.map(_encode, batches)


def end_of(tokenizer: Any, wanted: DocumentEnd) -> int | None:
    """The token behind every document. ValueError for a tokenizer that has none.

    A chat model's eos ends its turns. Behind plain documents it would learn to end them before they begin.
    """
    if wanted is DocumentEnd.none or (wanted is DocumentEnd.auto and tokenizer.chat_template):
        return None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos token to end documents with; "
            "use data.document_end=none"
        )
    end: int = tokenizer.eos_token_id
    return end


def encode(tokenizer: Any, texts: list[str], end: int | None) -> list[np.ndarray]:
    """Tokens of whole documents: as the tokenizer begins them (some with bos), and ended by `end` if there is one.

    Special tokens that are spelled out in a text stay text, or documentation about tokenizers would end documents.
    Conversations are as the chat template writes them, without tokens where it refuses one (`why_refused`).
    """
    plain = begun_ids(tokenizer, [text for text in texts if not is_chat(text)], split_special_tokens=True)
    rows = iter(plain if end is None else [[*row, end] for row in plain])
    written = [chat_row(tokenizer, text) if is_chat(text) else next(rows) for text in texts]
    return [np.asarray(row, dtype=np.int32) for row in written]


def chat_row(tokenizer: Any, text: str) -> list[int]:
    try:
        return chat_tokens(tokenizer, text)
    except ValueError:  # one of many: those who count the documents count it
        return []


# One tokenizer per worker process: sending it with every batch would cost more than tokenising.
_held: dict[str, Any] = {}


def _start(tokenizer: Any, end: int | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _held.update(tokenizer=tokenizer, end=end)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool outlives a parent that is killed, and its processes wait for work for ever."""
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return encode(_held["tokenizer"], texts, _held["end"])
