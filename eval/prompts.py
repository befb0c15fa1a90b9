"""From a row to the token ids that the model sees: render, cut out the middle, wrap in the chat template.

Over-long prompts lose their middle, since instructions stand at both ends (LongBench). As there, the two
halves are decoded and tokenised again, and the chat template comes after the cut.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from data.chats import prompt as rendered
from data.tokens import added_ids, begun_ids, plain_ids
from eval.tasks import Row, Task

LONGEST_MADE = 32_768  # tokens of a built-in row's prompt, where eval.max_length does not ask for more


@dataclass
class Prompt:
    """Token ids of one row's prompt, int32 [length], and whether its middle was cut out."""

    ids: torch.Tensor
    truncated: bool


class Prompter:
    """Turns rows into prompts of at most `limit(task)` tokens for one tokenizer and one window."""

    def __init__(self, tokenizer: Any, window: int, max_length: int | None = None, chat: bool = False):
        if max_length is not None and max_length > window:
            raise ValueError(f"eval.max_length={max_length} is larger than the model's window of {window} tokens")
        if chat and not tokenizer.chat_template:
            raise ValueError("eval.chat_template=on, but the model's tokenizer has no chat template; use auto or off")
        self.tokenizer, self.window, self.max_length, self.chat = tokenizer, window, max_length, chat
        self.begin, self.ending = map(len, added_ids(tokenizer))
        self.overhead = len(self._chat_ids("")) if chat else 0

    def limit(self, task: Task) -> int:
        """Prompt tokens of a task: `max_length`, and room for the output inside the window."""
        room = self.window - task.max_new_tokens
        limit = min(self.max_length or room, room)
        if limit <= self.overhead + 1:
            raise ValueError(
                f"task '{task.name}' wants {task.max_new_tokens} output tokens of a window of {self.window}"
            )
        return limit

    def fits(self, task: Task, text: str) -> bool:
        """Whether a row that is made to fill the room does: without `max_length`, that of no endless window."""
        return len(self._ids(task, text)) <= min(self.limit(task), self.max_length or LONGEST_MADE)

    def encode(self, task: Task, row: Row) -> Prompt:
        limit, text = self.limit(task), task.render(row)
        ids = self._ids(task, text)
        truncated = len(ids) > limit
        if truncated:
            plain = self._tokenise(text)
            half = (limit - (self.overhead if self._wraps(task) else 0)) // 2
            ids = self._ids(task, self._decode(plain[self.begin : half]) + self._decode(plain[-half:]))
            # The seam may tokenise into a few more tokens than were cut: the limit stands.
            ids = ids[: (limit + 1) // 2] + ids[len(ids) - limit // 2 :] if len(ids) > limit else ids
        return Prompt(torch.tensor(ids, dtype=torch.int32), truncated)

    def _wraps(self, task: Task) -> bool:
        return self.chat and task.chat

    def _tokenise(self, text: str) -> list[int]:
        return begun_ids(self.tokenizer, [text], self.ending)[0]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _ids(self, task: Task, text: str) -> list[int]:
        return self._chat_ids(text) if self._wraps(task) else self._tokenise(text)

    def _chat_ids(self, text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        # What begins a conversation is the template's to write: nothing is added.
        return plain_ids(self.tokenizer, rendered(self.tokenizer, message))


def prompts_digest(prompts: list[Prompt]) -> str:
    """Hash of all token ids: two scores compare only where it is the same."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(len(prompt.ids).to_bytes(4, "little") + prompt.ids.numpy().tobytes())
    return sha.hexdigest()[:16]
