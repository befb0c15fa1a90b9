"""Tiny corpora and a tiny tokenizer for the tests of the data stage."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conf.schema import Config, DataConfig, ModelConfig, SourceConfig

WORDS = [f"w{number}" for number in range(200)]


def save_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer: 0 for unknown words, then WORDS, then the eos token, which is no word."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def documents(count: int, seed: int = 0, shortest: int = 20, longest: int = 80) -> list[str]:
    """Random documents of WORDS, all different."""
    random_ = random.Random(seed)
    return [" ".join(random_.choices(WORDS, k=random_.randint(shortest, longest))) for _ in range(count)]


def write_jsonl(path: Path, texts: Iterable[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)))
    return path


def make_config(tmp_path: Path, sources: dict[str, SourceConfig], **data: object) -> Config:
    """Sequences of 64 tokens, 6,400 for training and 640 held out unless told otherwise."""
    folder = tmp_path / "model"
    if not folder.exists():
        save_tokenizer(folder)
    settings = {"tokens": 6400, "sequence_length": 64, "validation_tokens": 640, **data}
    return Config(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(sources=sources, **settings),  # type: ignore[arg-type]
        output_dir=str(tmp_path / "outputs"),
    )


def local(*files: Path, weight: float = 1.0, **more: object) -> SourceConfig:
    return SourceConfig(data_files=[str(file) for file in files], weight=weight, **more)  # type: ignore[arg-type]
