"""A tiny Llama with a tokenizer of its own, and a run whose first stages are finished, for the eval tests."""

import json
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import conf
from conf.plan import Plan
from conf.schema import Config, typed_config
from eval.text import passages
from mha2mla import ConversionOptions, collect_statistics, convert, needs_calibration

WINDOW = 1024
TASKS = "[passkey,classification,code_completion]"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 600 tokens with a beginning token in front of every prompt, as Llama's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(passages()[:200], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    return fast


def model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def compose_config(folder: Path, *overrides: str) -> Config:
    """A configuration over `folder/model`, with three tasks of two rows each."""
    words = [
        "model=from_path",
        f"model.path={folder / 'model'}",
        f"output_dir={folder / 'out'}",
        "model.pretrain_tokens=1e6",
        "data.tokens=4096",
        "data.sequence_length=64",
        "eval.limit=2",
        "eval.max_length=300",
        "eval.perplexity_tokens=256",
        "eval.perplexity_sequence_length=32",
        "eval.divergence_tokens=64",
        f"eval.tasks={TASKS}",
        "launch.device=cpu",
        "tracking=none",
        *overrides,
    ]
    with initialize_config_dir(str(Path(conf.__file__).parent), version_base="1.3"):
        return typed_config(compose("config", overrides=words))


def write_original(folder: Path, original: PreTrainedModel | None = None) -> None:
    (original or model()).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")


def finish_before_evaluation(config: Config, mla: ConversionOptions | None = None) -> Plan:
    """Sampled data, a converted and a "healed" model in the folders of `config`'s plan, sealed as finished."""
    plan = Plan(config)
    ids = [token for text in passages()[:40] for token in [*tokenizer()(text)["input_ids"], 2]]
    length = config.data.sequence_length
    rows = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    positions = [[place % 40 for place in range(length)] for _ in rows]
    with plan.sample.run() as stage:
        pq.write_table(
            pa.table({"input_ids": rows, "position_ids": positions}), stage.folder / "validation-00000.parquet"
        )
    mla = mla or ConversionOptions(rope_dim=4, kv_lora_rank=6)
    statistics = collect_statistics(model(), [torch.tensor(rows[:4])]) if needs_calibration(mla) else None
    converted, report = convert(model(), mla, statistics)
    with plan.convert.run() as stage:
        converted.save_pretrained(stage.folder)
        (stage.folder / "conversion.json").write_text(json.dumps(report.to_dict()))
    with torch.no_grad():
        converted.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    history = {
        "train": [{"step": 5, "tokens": 320, "loss": 5.0, "tokens_per_second": 100.0}],
        "validation": [
            {"step": 0, "tokens": 0, "loss": 6.0, "perplexity": 403.4},
            {"step": 5, "tokens": 320, "loss": 5.0, "perplexity": 148.4},
        ],
    }
    with plan.finetune.run() as stage:
        converted.save_pretrained(stage.folder)
        tokenizer().save_pretrained(stage.folder)
        (stage.folder / "history.json").write_text(json.dumps(history))
    return plan
