"""The original model in both roles of a conversation.

A user's turn is what it goes on with after the opening of its chat template (Magpie: Xu et al., arXiv 2406.08464,
section 2.1), or a request about a passage. Questions and answers are sampled.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from conf.steps import EveryStep
from data.chats import Message, prompt
from data.stops import end_tokens, pad_token, padded_left
from data.tokens import check_ids, plain_ids
from mha2mla.finite import FiniteScores

TOGETHER = 32  # conversations generated as one batch
LONGEST_QUESTION = 96  # tokens
CHARACTERS_PER_TOKEN = 3  # few enough that a passage fits into the room it is given
REQUESTS = (
    "Summarize this text in a few sentences.",
    "What is this text about?",
    "List the most important points of this text.",
    "Ask a question that this text answers, then answer it.",
    "Explain this text in simple words.",
    "Who or what is named in this text, and what is said of them?",
    "Give this text a title and say why it fits.",
    "What can be learned from this text?",
)


class Speaker:
    """`texts` to ask about, endless or none; a conversation takes at most about three quarters of `room` tokens."""

    def __init__(self, model: Any, tokenizer: Any, texts: Iterator[str], room: int, seed: int):
        self.model, self.tokenizer, self.room, self.seed = model, tokenizer, room, seed
        self.texts, self.read = texts, 0
        self.on_step: Callable[[int, int], None] = lambda step, room: None  # is told of every token of a batch
        self.opening, self.turn_end = user_turn(tokenizer)
        self.special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        settings = model.generation_config
        self.ends = end_tokens(tokenizer, settings, model.config)
        self.pad = pad_token(tokenizer, settings, model.config)
        # All of it: `generate` fills what a configuration leaves open from the checkpoint's own.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=50,
            pad_token_id=self.pad,
        )

    def conversations(self, number: int) -> list[list[Message]]:
        """Batch `number`, always the same: one half about passages, where there are texts, the others free."""
        with torch.random.fork_rng():
            torch.manual_seed(1_000_003 * self.seed + number)
            passages = self.passages(number)
            free = self.questions(TOGETHER - len(passages))
            return self.answered(passages) + self.answered(free)

    def passages(self, number: int) -> list[str]:
        """Requests about passages that take at most half of the room."""
        half, found = TOGETHER // 2, []
        skipped, self.read = number * half - self.read, (number + 1) * half
        for text in islice(self.texts, skipped, skipped + half):
            length = int(torch.randint(100, max(101, self.room // 2 * CHARACTERS_PER_TOKEN), ()))
            start = int(torch.randint(max(1, len(text) - length), ()))
            passage = text[start : start + length]
            for token in self.special:  # documentation of tokenizers spells them out
                passage = passage.replace(token, "")
            request = REQUESTS[int(torch.randint(len(REQUESTS), ()))]
            parts = [passage, request]
            found.append("\n\n".join(parts if torch.rand(()) < 0.5 else reversed(parts)))
        return found

    def questions(self, count: int) -> list[str]:
        """What a user says, as the model sees users; what does not come to an end is left out."""
        if not self.opening:
            return []
        turns = self.continued([self.opening] * count, min(LONGEST_QUESTION, self.room // 4), self.turn_end)
        return [text.strip() for text, end in turns if end and text.strip()]

    def answered(self, questions: list[str]) -> list[list[Message]]:
        asked = [[{"role": "user", "content": question}] for question in questions]
        answers = self.continued([prompt(self.tokenizer, messages) for messages in asked], self.room // 4)
        return [
            [*messages, {"role": "assistant", "content": text, "ended_by": end}]
            for messages, (text, end) in zip(asked, answers, strict=True)
            if text.strip()
        ]

    @torch.inference_mode()
    def continued(self, prompts: list[str], room: int, stop: str | None = None) -> list[tuple[str, str]]:
        """What is said after each prompt and what ended it: an end token, `stop`, or nothing in so many tokens.

        Empty where it holds other special tokens: it would not be read again as it was said.
        """
        if not prompts:
            return []
        rows, ends = [plain_ids(self.tokenizer, text) for text in prompts], self.ends
        check_ids("conversations", rows, self.tokenizer, self.model.config)
        ids, mask = (states.to(self.model.device) for states in padded_left(rows, self.pad))
        if stop in self.special:  # else it is found in the text, when all of it is there
            ends = [*ends, self.tokenizer.convert_tokens_to_ids(stop)]
        length = ids.shape[1]
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=room,
            eos_token_id=ends or None,
            logits_processor=[FiniteScores()],
            stopping_criteria=StoppingCriteriaList([EveryStep(lambda step: self.on_step(step, room), length)]),
        )
        return [self.said(row, stop) for row in output[:, length:].tolist()]

    def said(self, ids: list[int], stop: str | None) -> tuple[str, str]:
        place = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        text, end = self.tokenizer.decode(ids[:place]), self.tokenizer.decode(ids[place : place + 1])
        if stop and stop in text:
            text, end = text.partition(stop)[0], stop
        return ("", "") if any(token in text for token in self.special) else (text, end)


def user_turn(tokenizer: Any) -> tuple[str, str | None]:
    """What the template writes before a user's words, and the first of what it writes behind them; an empty opening
    where it changes the words themselves."""
    mark = "\u2042"
    before, found, behind = prompt(tokenizer, [{"role": "user", "content": mark}]).partition(mark)
    return (before, next(iter(behind.split()), None)) if found else ("", None)
