"""Everything the models are scored on, made once and before any of them is loaded: prompts and windows."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conf.evaluation import ChatTemplate
from conf.precision import torch_dtype
from conf.pretrained import load_config, load_tokenizer
from conf.schema import Config
from data.stops import end_tokens, generation_settings, pad_token
from data.tokens import check_ids, plain_ids
from data.windows import text_windows
from eval.benchmarks import Benchmarks
from eval.generate import Stops
from eval.perplexity import packed_windows
from eval.prompts import Prompt, Prompter, prompts_digest
from eval.sources import load_rows
from eval.tasks import Row, Task
from eval.unseen import unseen_texts


@dataclass
class TaskInputs:
    task: Task
    rows: list[Row]
    prompts: list[Prompt]
    digest: str

    @property
    def tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


@dataclass
class TextInputs:
    """Windows of one text for perplexity."""

    name: str
    windows: list[torch.Tensor]
    digest: str

    @property
    def tokens(self) -> int:
        return sum(len(window) for window in self.windows)


@dataclass
class Inputs:
    texts: list[TextInputs]
    tasks: list[TaskInputs]
    tokenizer: Any
    stops: Stops
    dtype: torch.dtype  # of every model compared
    chat: bool  # whether prompts are wrapped in the tokenizer's chat template
    benchmarks: Benchmarks | None = None


def prepare(config: Config, model: str, sampled: Path, device: str) -> Inputs:
    """Inputs for the models of one configuration; raises ValueError for whatever cannot be evaluated.

    `model` is the original's folder or hub id, whose tokenizer, window and stop tokens hold for all. `device` is the
    one they run on.
    """
    options, revision = config.eval, config.model.revision
    tokenizer = load_tokenizer(model, revision)
    original = load_config(model, revision)
    wraps = options.chat_template is ChatTemplate.on
    wraps = wraps or (options.chat_template is ChatTemplate.auto and bool(tokenizer.chat_template))
    prompter = Prompter(tokenizer, window_of(original), options.max_length, wraps)
    texts = [("validation", packed_windows(sampled, options.perplexity_sequence_length, options.perplexity_tokens))]
    if options.perplexity_text:
        file = Path(options.perplexity_text).expanduser()
        if not file.is_file():
            raise ValueError(f"eval.perplexity_text={file}: no such file")
        windows = text_windows(tokenizer, file, options.perplexity_sequence_length, options.perplexity_tokens)
        check_ids(f"eval.perplexity_text={file}", windows, tokenizer, original)
        texts.append((file.stem, windows))
    for name, found in unseen_texts(config, tokenizer, options.divergence_tokens).items():
        check_ids(f"text '{name}'", found, tokenizer, original)
        if name not in dict(texts):  # a text of the user's own may be called so
            texts.append((name, found))
    tasks = []
    for task, rows in load_rows(options, prompter.fits):
        prompts = [prompter.encode(task, row) for row in rows]
        check_ids(f"task '{task.name}'", [prompt.ids for prompt in prompts], tokenizer, original)
        tasks.append(TaskInputs(task, rows, prompts, prompts_digest(prompts)))
    return Inputs(
        texts=[TextInputs(name, windows, windows_digest(windows)) for name, windows in texts],
        tasks=tasks,
        tokenizer=tokenizer,
        stops=stops_of(tokenizer, model, revision),
        dtype=torch_dtype(options.dtype, device == "cpu", stored=original.dtype),
        chat=wraps,
        benchmarks=Benchmarks(options.benchmarks, options.benchmark_data, options.benchmark_limit)
        if options.benchmarks
        else None,
    )


def window_of(config: Any) -> int:
    """Positions that the model was made for."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def stops_of(tokenizer: Any, model: str, revision: str | None) -> Stops:
    """What ends and pads outputs of a checkpoint (folder or hub id)."""
    config, settings = load_config(model, revision), generation_settings(model, revision)
    pad, newline = pad_token(tokenizer, settings, config), plain_ids(tokenizer, "\n")
    return Stops(end_tokens(tokenizer, settings, config), pad, newline[-1] if newline else pad)


def windows_digest(windows: list[torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for window in windows:
        sha.update(len(window).to_bytes(4, "little") + window.to(torch.int32).numpy().tobytes())
    return sha.hexdigest()[:16]
