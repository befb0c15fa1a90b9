"""Stage `converse`: conversations that the original model has with itself, for sources of kind=generated.

    python -m data.converse data=chat

Plain text heals what a chat model knows of text, not how it answers (docs/log.md). Where no conversations are at hand,
the model's own will do: they need no download and are what it would say. In one half it writes the user's turn too,
from the opening of its chat template (Magpie: Xu et al., arXiv 2406.08464, section 2.1); in the other half it is asked
something about a passage of the other sources. All of them are for training: what validation reads stays real text.

Written: `conversations-<n>.jsonl`, rows {"messages": [{role, content}, ...]}. An answer that did not end in its room is
marked `unfinished`, and none is taught to end there. Every file has a seed of its own, so a killed run goes on with the
file that it was at.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conf.devices import pick_device
from conf.errors import stage_main
from conf.models import local_model
from conf.plan import Plan
from conf.precision import Dtype, torch_dtype
from conf.schema import Config, SourceKind
from data.calibration import training_texts
from data.chats import Messages, as_text, chat_tokens, require_template
from data.documents import train_tokens
from data.progress import Progress

TOGETHER = 32  # conversations a file, generated as one batch
LONGEST_QUESTION = 96  # tokens
MORE = 1.05  # tokens generated for each that is wanted: copies are taken once
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


def converse(config: Config) -> None:
    """Run the stage: as many conversations as the generated sources' share of the training tokens."""
    plan = Plan(config)
    stage = plan.converse
    if not plan.converses:
        raise ValueError("no source of kind=generated among data.sources; there is one in data=chat")
    if stage.skip(config.force):
        return
    path, revision = local_model(config), config.model.revision
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    require_template(tokenizer, "a source of kind=generated")
    device = pick_device(config.launch.device)
    wanted = int(MORE * generated_share(config) * train_tokens(config))
    with stage.run(resumable=True, force=config.force):
        dtype = torch_dtype(Dtype.native, device == "cpu", stored="auto")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, revision=revision)
        speaker = Speaker(model.to(device).eval(), tokenizer, config)
        progress, tokens, files = Progress("converse", wanted, "tokens"), 0, 0
        while tokens < wanted:
            file = stage.folder / f"conversations-{files:05d}.jsonl"
            if not file.exists():
                write_chats(file, speaker.conversations(files))
            found = sum(len(chat_tokens(tokenizer, as_text(chat))) for chat in read_chats(file))
            progress.advance(found)
            tokens, files = tokens + found, files + 1
        progress.close()
        stage.metrics.update({"tokens": tokens, "files": files})
    print(f"converse: {tokens:,} tokens of {TOGETHER * files:,} conversations or fewer, in {stage.folder}")


class Speaker:
    """The original model in both roles."""

    def __init__(self, model: Any, tokenizer: Any, config: Config):
        self.model, self.tokenizer, self.seed = model, tokenizer, config.data.seed
        self.config, self.room = config, config.data.sequence_length
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.opening = opening(tokenizer)
        self.texts, self.read = endless(config), 0

    def conversations(self, number: int) -> list[Messages]:
        """File `number`: one half free, the other about passages, where there are other sources."""
        with torch.random.fork_rng():
            torch.manual_seed(1_000_003 * self.seed + number)
            passages = self.passages(number)
            asked = self.answered(passages, self.room // 4)
            return asked + self.answered(self.questions(TOGETHER - len(passages)), self.room // 4)

    def passages(self, number: int) -> list[str]:
        """Requests about passages that take at most half of a sequence."""
        half, found = TOGETHER // 2, []
        skipped, self.read = number * half - self.read, (number + 1) * half
        for text in islice(self.texts, skipped, skipped + half):
            length = int(torch.randint(100, max(101, self.room // 2 * CHARACTERS_PER_TOKEN), ()))
            start = int(torch.randint(max(1, len(text) - length), ()))
            request = REQUESTS[int(torch.randint(len(REQUESTS), ()))]
            parts = [text[start : start + length], request]
            found.append("\n\n".join(parts if torch.rand(()) < 0.5 else reversed(parts)))
        return found

    def questions(self, count: int) -> list[str]:
        """What a user says, as the model sees users; those that do not come to an end are left out."""
        if not self.opening:
            return []
        turns = self.continued([self.opening] * count, min(LONGEST_QUESTION, self.room // 4))
        return [text.strip() for text, finished in turns if finished and text.strip()]

    def answered(self, questions: list[str], room: int) -> list[Messages]:
        asked = [[{"role": "user", "content": question}] for question in questions]
        prompts = [
            self.tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked
        ]
        found = []
        for question, (text, finished) in zip(asked, self.continued(prompts, room), strict=True):
            answer: dict[str, Any] = {"role": "assistant", "content": text}
            if text.strip():
                found.append([*question, answer if finished else answer | {"unfinished": True}])
        return found

    @torch.inference_mode()
    def continued(self, prompts: list[str], room: int) -> list[tuple[str, bool]]:
        """Sampled at temperature 1 from the 50 likeliest tokens: the text up to its end, and whether there was one."""
        if not prompts:
            return []
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ends = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        how = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=50,
            max_new_tokens=room,
            eos_token_id=sorted(ends),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = self.model.generate(**batch.to(self.model.device), generation_config=how)
        found = []
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), None)
            found.append((self.tokenizer.decode(row[:end], skip_special_tokens=True), end is not None))
        return found


def generated_share(config: Config) -> float:
    """Of the training tokens."""
    sources = config.data.sources.values()
    own = sum(source.weight for source in sources if source.kind is SourceKind.generated)
    return own / sum(source.weight for source in sources) if own else 0.0


def opening(tokenizer: Any) -> str:
    """What the template writes before a user's words; empty where it changes them."""
    mark = "\u2042"
    before, found, _ = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False).partition(
        mark
    )
    return before if found else ""


def endless(config: Config) -> Iterator[str]:
    """Texts to ask about, over and over; none where all other sources are conversations themselves."""
    found = True
    while found:
        found = False
        for text in training_texts(config):
            found = True
            yield text


def write_chats(file: Path, chats: list[Messages]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    temporary.replace(file)


def read_chats(file: Path) -> Iterator[Messages]:
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["messages"]


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    stage_main(converse)(cfg)


if __name__ == "__main__":
    main()
