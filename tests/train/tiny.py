"""A tiny random Llama with a tokenizer, packed data for it, and both laid out as finished stages."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hydra import compose, initialize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conf.plan import Plan
from conf.schema import Config, typed_config
from mha2mla import ConversionOptions, convert

VOCAB = 64
LENGTH = 32


def write_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
    mla: ConversionOptions | None = None,
    seed: int = 0,
) -> Path:
    """The model itself, or with `mla` what conversion makes of it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if mla is not None:
        model, _ = convert(model, mla)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def write_shard(file: Path, rows: int, length: int = LENGTH, vocab: int = VOCAB, seed: int = 0) -> None:
    """`rows` packed sequences. Every token follows from the one before, so there is much to learn; the number of
    documents, and with it of target tokens, differs from row to row."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    tokens, positions = [], []
    for _ in range(rows):
        starts = {0} | {below(length) for _ in range(below(6))}
        row, places = [], []
        for place in range(length):
            row.append(below(vocab) if place in starts else (row[-1] * 5 + 7) % vocab)
            places.append(0 if place in starts else places[-1] + 1)
        tokens.append(row)
        positions.append(places)
    kind = pa.list_(pa.int32())
    pq.write_table(pa.table({"input_ids": pa.array(tokens, kind), "position_ids": pa.array(positions, kind)}), file)


def write_data(folder: Path, rows: int = 48, validation_rows: int = 6, **options: int) -> Path:
    """Two training shards and one for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "train-00000.parquet", rows // 2, seed=1, **options)
    write_shard(folder / "train-00001.parquet", rows - rows // 2, seed=2, **options)
    write_shard(folder / "validation-00000.parquet", validation_rows, seed=3, **options)
    return folder


def overrides(root: Path, **finetune: object) -> list[str]:
    """Command line of a small fine-tuning in `root`: 12 steps of 4 x 32 tokens in float32."""
    options = {
        "learning_rate": 3e-3,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "mixed_precision": "no",
        "log_every": 1,
        "eval_every": 5,
        "save_every": 3,
        **finetune,
    }
    settings = [f"finetune.{key}={value}" for key, value in options.items()]
    return [
        "model=from_path",
        f"model.path={root / 'pretrained'}",
        f"output_dir={root / 'outputs'}",
        "tracking=none",
        *settings,
    ]


def composed(words: list[str]) -> Config:
    with initialize(config_path="../../conf", version_base="1.3"):
        return typed_config(compose("config", words))


def finished_stages(root: Path, words: list[str]) -> Plan:
    """The plan of a command line, with `convert` and `sample` already done."""
    if not (root / "pretrained").exists():
        write_model(root / "pretrained")
    plan = Plan(composed(words))
    if not plan.convert.record():
        with plan.convert.run() as stage:
            write_model(stage.folder)
        with plan.sample.run() as stage:
            write_data(stage.folder)
    return plan
