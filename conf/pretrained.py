"""A checkpoint's configuration and tokenizer, read, or refused in one line that names the checkpoint.

Everything that reads them reads them here. Code that a checkpoint brings is never run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

import mha2mla  # noqa: F401  registers the classes of converted models
from conf.errors import one_line
from conf.models import check_files
from mha2mla.token_ids import without_negative_pad

# The largest that a configuration may say: ten times what any model has, and little enough to be looped over.
LARGEST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "moe_intermediate_size": 100_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 10**12,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "num_experts_per_tok": 100_000,
}


def load_config(path: str | Path, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The configuration of a checkpoint folder or hub id. ValueError if there is none or it makes no sense."""
    if Path(path).exists() and not gguf_file:
        check_files(str(path), Path(path))

    def read() -> Any:
        where: dict[str, Any] = {"revision": revision or "main"} | ({"gguf_file": gguf_file} if gguf_file else {})
        if not gguf_file:
            check_numbers(PreTrainedConfig.get_config_dict(path, **where)[0])
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **where)

    return attempt(
        read, f"{path}: its configuration (config.json) cannot be read", "give a checkpoint folder or a hub id"
    )


def skeleton(path: str | Path, config: Any) -> Any:
    """The causal language model of a configuration, without weights. ValueError if it cannot be built: before anything
    is loaded, this is what shows that its rotation, its activation and the rest are such as transformers knows."""

    def build() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    return attempt(build, f"{path}: no model can be built of its configuration", "mend config.json")


def load_tokenizer(path: str | Path, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer of a checkpoint folder or hub id. ValueError if there is none or it cannot be read."""
    where: dict[str, Any] = {"revision": revision or "main"} | ({"gguf_file": gguf_file} if gguf_file else {})

    def read() -> Any:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)
        tokenizer("a", add_special_tokens=False)  # what only shows in use
        return tokenizer

    remedy = "copy tokenizer.json and tokenizer_config.json from the model that the checkpoint was made from"
    return attempt(read, f"{path}: its tokenizer cannot be read", remedy)


def load_generation_config(path: str | Path, revision: str | None = None) -> GenerationConfig | None:
    """generation_config.json of a checkpoint; None where there is none. ValueError if it cannot be read."""

    def read() -> GenerationConfig | None:
        try:
            found = without_negative_pad(GenerationConfig.from_pretrained(path, revision=revision or "main"))
        except OSError:
            if (Path(path) / "generation_config.json").exists():
                raise
            return None
        found.validate(strict=True)  # as it is when it is saved
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            check_tokens(name, getattr(found, name))
        return found

    return attempt(read, f"{path}: its generation_config.json cannot be read", "mend or remove that file")


def attempt(read: Callable[[], Any], problem: str, remedy: str) -> Any:
    """What `read` returns. Whatever a library raises on the way is of the files it reads: it becomes one ValueError."""
    try:
        return read()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exceptions
        reason = ("" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: ") + one_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it brings code of its own, for a family that transformers does not have; only its own are converted"
            )
        raise ValueError(f"{problem} ({reason}); {remedy}") from error


def check_tokens(name: str, value: Any) -> None:
    """ValueError unless it is a token's number, several, or none."""
    for token in value if isinstance(value, list) else [value]:
        if token is not None and (type(token) is not int or token < 0):
            raise ValueError(f"{name}={str(value)[:40]} must be the number of a token, a list of such, or null")


def check_numbers(config: Any) -> None:
    """ValueError for sizes that no model has: libraries would count up to them, or divide by them."""
    if not isinstance(config, dict):
        raise ValueError("it is no JSON object")
    ropes = [rope for rope in (config.get("rope_parameters"), config.get("rope_scaling")) if isinstance(rope, dict)]
    ropes += [rope for nested in ropes for rope in nested.values() if isinstance(rope, dict)]
    for theta in [part.get("rope_theta") for part in [config, *ropes]]:
        if theta is not None and (type(theta) not in (int, float) or not 0 < theta < 1e30):
            raise ValueError(f"rope_theta={str(theta)[:40]} must be a positive number")
    for share in [config.get("rotary_pct"), *(part.get("partial_rotary_factor") for part in [config, *ropes])]:
        if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
            raise ValueError(f"partial_rotary_factor={str(share)[:40]} must lie in (0, 1]")
    for name, most in LARGEST.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{name}={str(value)[:40]} must be a whole number from 1 to {most:,}")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
