"""Folders that hold more, less or something else than a checkpoint: taken as they are, or refused in one line."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from conf.models import check_files, check_folder, local_model
from conf.pretrained import load_config, load_generation_config, load_tokenizer, skeleton
from conf.schema import Config, ModelConfig
from mha2mla import ConversionOptions, resolve_options
from mha2mla.families import family_of
from tests.eval.tiny import write_original
from tests.fuzz import json_mutations, mutations, refusal
from train.inspect import inspect
from train.resources import sizes_of


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """What libraries log of damaged files holds text that cannot be sent from one process to another."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    write_original(folder)
    return folder / "model"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "a model"))


def refused(read: Callable[[], Any], *said: str) -> None:
    with pytest.raises(ValueError) as error:
        read()
    line = str(error.value)
    assert "\n" not in line and all(each in line for each in said), line


def lora(checkpoint: Path, folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def test_an_adapter_is_never_laid_over_a_model_unasked(checkpoint: Path, tmp_path: Path) -> None:
    """By transformers it is: the model that is converted would be another one than the folder's weights."""
    local_model(Config(model=ModelConfig(path=str(checkpoint))))
    lora(checkpoint, tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, checkpoint)
    for folder, rest in ((checkpoint, "remove the files adapter_*"), (tmp_path / "adapter", "no whole model")):
        said = (str(folder), "merge it first", rest)
        refused(lambda folder=folder: local_model(Config(model=ModelConfig(path=str(folder)))), *said)
        refused(lambda folder=folder: load_config(folder), *said)
        refused(lambda folder=folder: check_folder("finetune.teacher", str(folder)), "finetune.teacher", *said)
        refused(lambda folder=folder: inspect(str(folder), [0.5]), *said)


def test_an_adapter_on_the_hub_is_seen_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def cached(path: str, name: str, revision: str | None = None) -> str | None:
        return "/cache/adapter_config.json" if name == "adapter_config.json" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    refused(lambda: local_model(Config(model=ModelConfig(path="org/adapter"))), "org/adapter", "merge it first")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model.Q4_K_M.gguf"], "a GGUF file is not read"),
        (["consolidated.safetensors", "params.json", "tekken.json"], "consolidated weights is not read"),
        (["model.onnx"], "an ONNX model is not read"),
        (["step-20/config.json", "step-20/model.safetensors"], "but step-20/ does: give that folder"),
        (["notes.txt"], "only notes.txt"),
        ([], "only nothing"),
    ],
)
def test_a_folder_of_something_else_is_named_for_what_it_is(files: list[str], said: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    refused(lambda: check_files("model.path", tmp_path), "model.path holds no config.json", said)
    refused(lambda: load_config(tmp_path), f"{tmp_path} holds no config.json", said)


def test_a_file_is_no_folder(checkpoint: Path) -> None:
    for path in (checkpoint / "model.safetensors", checkpoint / "config.json"):
        refused(lambda path=path: check_folder("model.path", str(path)), f"model.path={path} is a file")
        refused(lambda path=path: load_config(path), f"{path} is a file")
    refused(lambda: load_config("/no/such/folder"), "/no/such/folder")
    check_files("model.path", checkpoint)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json"),
        ("[]", "config.json"),
        ("{}", "model_type"),
        ('{"model_type": "no-such-family"}', "no-such-family"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "num_attention_heads=0"),
        ('{"model_type": "qwen2", "num_hidden_layers": 1000000000000}', "num_hidden_layers=1000000000000"),
        ('{"model_type": "llama", "hidden_size": "64"}', "hidden_size=64"),
        ('{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}', "must be a multiple"),
        ('{"model_type": "llama", "rope_theta": NaN}', "rope_theta=nan"),
        ('{"model_type": "llama", "rope_parameters": {"rope_theta": 0}}', "rope_theta=0"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}', "brings code of its own"),
    ],
)
def test_a_configuration_that_makes_no_sense(text: str, said: str, checkpoint: Path) -> None:
    (checkpoint / "mine.py").write_text("raise SystemExit('this code is never run')\n")
    (checkpoint / "config.json").write_text(text)
    refused(lambda: load_config(checkpoint), str(checkpoint), said)


def test_a_checkpoint_without_a_tokenizer_and_a_tokenizer_alone(checkpoint: Path, tmp_path: Path) -> None:
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    for file in [*checkpoint.glob("*token*"), *checkpoint.glob("*.jinja")]:
        file.rename(alone / file.name)
    assert load_config(checkpoint).model_type == "llama"
    refused(lambda: load_tokenizer(checkpoint), str(checkpoint), "its tokenizer cannot be read", "copy tokenizer.json")
    assert len(load_tokenizer(alone)) == 600


def test_generation_settings(checkpoint: Path) -> None:
    file = checkpoint / "generation_config.json"
    found = load_generation_config(checkpoint)
    assert found is not None and found.eos_token_id == 2
    for text, said in (
        ("[]", ""),
        ("{", ""),
        ('{"eos_token_id": "</s>"}', "eos_token_id"),
        ('{"max_new_tokens": -1}', ""),
    ):
        file.write_text(text)
        refused(lambda: load_generation_config(checkpoint), str(checkpoint), "generation_config.json", said)
    file.unlink()
    assert load_generation_config(checkpoint) is None


def before_weights(checkpoint: Path) -> None:
    """What stages ask of a configuration before they load a weight."""
    config = load_config(checkpoint)
    family_of(config)
    skeleton(checkpoint, config)
    resolve_options(config, ConversionOptions())
    sizes_of(config)
    inspect(str(checkpoint), [0.5])


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "use_sliding_window": True},
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    "mixtral": {"num_local_experts": 2},
    "gpt_neox": {"rotary_pct": 0.5},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_configurations(family: str, checkpoint: Path, fuzz: int) -> None:
    sizes = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    if family == "gpt_neox":
        heads = {"num_attention_heads": 4}
    AutoConfig.for_model(family, **sizes, **heads, **FAMILIES[family]).save_pretrained(checkpoint)
    file = checkpoint / "config.json"
    value = json.loads(file.read_text())
    before_weights(checkpoint)
    outcomes = []
    for changed in json_mutations(value, 0, 40 * fuzz):
        file.write_text(json.dumps(changed))
        outcomes.append(refusal(lambda: before_weights(checkpoint), ""))
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
)
def test_damaged_files_beside_the_weights(name: str, checkpoint: Path, fuzz: int) -> None:
    file = checkpoint / name
    if name == "special_tokens_map.json":
        file.write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}))
    data = file.read_bytes()
    value = json.loads(data)

    def read() -> None:
        if name == "generation_config.json":
            load_generation_config(checkpoint)
        else:
            load_tokenizer(checkpoint)

    outcomes = []
    for damaged in mutations(data, 1, 20 * fuzz):
        file.write_bytes(damaged)
        outcomes.append(refusal(read, str(checkpoint)))
    for changed in json_mutations(value, 2, 20 * fuzz):
        file.write_text(json.dumps(changed))
        outcomes.append(refusal(read, str(checkpoint)))
    assert any(outcomes) or name == "special_tokens_map.json"
