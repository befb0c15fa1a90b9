"""Which model teaches, how it is loaded, and that a result depends on it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.plan import Plan
from conf.schema import DISTILLATION, Precision
from tests.train.tiny import VOCAB, composed, overrides, write_model
from train.launch import start
from train.losses import LOSSES
from train.teacher import load_teacher


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_model(tmp_path / "pretrained")
    return [*overrides(tmp_path, loss="kd"), "launch.device=cpu"]


def loaded(words: list[str]):
    config = composed(words)
    return load_teacher(config, start(config.finetune, config.launch))


def test_the_losses_with_a_teacher_are_those_of_the_schema():
    assert {"ce", *DISTILLATION} == set(LOSSES)


def test_the_original_model_teaches_unless_another_is_named(words, tmp_path):
    original = loaded(words)
    other = loaded([*words, f"finetune.teacher={write_model(tmp_path / 'other', seed=1)}"])
    embedding = load_file(tmp_path / "pretrained" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(original.get_input_embeddings().weight, embedding)
    assert other.get_input_embeddings().weight.shape == (VOCAB, 32)
    assert not torch.equal(other.get_input_embeddings().weight, embedding)
    assert not original.training and not any(parameter.requires_grad for parameter in original.parameters())
    assert loaded([*words, "finetune.loss=ce"]) is None


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.no, torch.float32), (Precision.bf16, torch.bfloat16)])
def test_the_teacher_is_as_precise_as_the_training(words, precision, dtype):
    assert loaded([*words, f"finetune.mixed_precision={precision.value}"]).dtype == dtype


def test_no_such_teacher(words, tmp_path):
    with pytest.raises(ValueError, match="finetune.teacher=/no/such/folder: no such folder"):
        Plan(composed([*words, "finetune.teacher=/no/such/folder"]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no complete checkpoint .*; finetune.teacher takes a hub id"):
        loaded([*words, f"finetune.teacher={tmp_path / 'empty'}"])


def test_a_result_depends_on_its_teacher(words, tmp_path):
    def key(*more: str) -> str:
        return Plan(composed([*words, *more])).finetune.key

    named = f"finetune.teacher={write_model(tmp_path / 'teacher', seed=1)}"
    keys = [key(), key("finetune.loss=ce"), key(named), key("finetune.kd_temperature=2")]
    write_model(tmp_path / "teacher", seed=2)
    keys.append(key(named))
    assert len(set(keys)) == 5
    inputs = Plan(composed(words)).finetune.inputs
    assert inputs["teacher"] == Plan(composed(words)).convert.inputs["model"]
    assert set(Plan(composed([*words, "finetune.loss=ce"])).finetune.inputs) == {"convert", "sample"}
    hub = Plan(composed([*words, "finetune.teacher=org/name"])).finetune.inputs
    assert hub["teacher"] == "hub:org/name@main"
