"""A teacher stored as its likeliest tokens: exact where all are stored, asked once, whole or not there."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.schema import FinetuneConfig
from mha2mla import output_head
from tests.train.test_distillation import MLA, close, gradients, plain_loss
from tests.train.tiny import LENGTH, VOCAB, composed, finished_stages, overrides, write_data, write_model
from train import finetune, stored_teacher
from train.batches import PackedRows
from train.losses import loss_function
from train.stored_teacher import StoredTeacher
from train.targets import IGNORE, Batch, forward

ROWS = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "ROWS", {"cpu": 24})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path_factory.mktemp("teacher"), dropout=0.0))
    return model.eval().requires_grad_(False)


@pytest.fixture
def student(tmp_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "student", dropout=0.0, mla=MLA))


def stored(data: Path, config: FinetuneConfig, teacher: PreTrainedModel, root: Path) -> StoredTeacher:
    rows = PackedRows(data, "train", VOCAB)
    return stored_teacher.stored_teacher(root, rows, config, {}, lambda: teacher, Accelerator(cpu=True))


def batch_of(data: Path, config: FinetuneConfig, teacher: PreTrainedModel, root: Path) -> Batch:
    return PackedRows(data, "train", VOCAB).batch(ROWS) | stored(data, config, teacher, root).batch(ROWS)


def grouped(config: FinetuneConfig, student: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss by torch's own functions: distributions over k + 1 things."""
    keep, t = batch["labels"] != IGNORE, config.kd_temperature
    scores = (forward(student, batch).logits[keep].float() / t).softmax(-1)
    mine = scores.gather(1, batch["teacher_tokens"][keep])
    theirs = batch["teacher_log_probabilities"][keep].exp()
    mine, theirs = (torch.cat((each, 1 - each.sum(-1, keepdim=True)), -1) for each in (mine, theirs))
    return t**2 * (theirs * (theirs / mine).log()).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_stored_are_the_distillation_itself(
    temperature: float, data: Path, teacher: PreTrainedModel, student: PreTrainedModel, tmp_path: Path
) -> None:
    config = FinetuneConfig(loss="kd", kd_temperature=temperature, teacher_top_k=VOCAB)
    batch = batch_of(data, config, teacher, tmp_path)
    loss, targets = loss_function(config)(student, batch)
    gradient, value = gradients(loss, student), loss.detach()
    plain = plain_loss(config, teacher, student, batch)
    assert int(targets) == int((batch["labels"] != IGNORE).sum())
    assert close(value, plain.detach(), 1e-5) and close(gradient, gradients(plain, student), 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_few_tokens_and_one_group_of_the_others(
    temperature: float, data: Path, teacher: PreTrainedModel, student: PreTrainedModel, tmp_path: Path
) -> None:
    config = FinetuneConfig(loss="kd", kd_temperature=temperature, teacher_top_k=5)
    batch = batch_of(data, config, teacher, tmp_path)
    loss, _ = loss_function(config)(student, batch)
    gradient, value = gradients(loss, student), loss.detach()
    plain = grouped(config, student, batch)
    assert close(value, plain.detach(), 1e-5) and close(gradient, gradients(plain, student), 1e-5)
    whole = plain_loss(config, teacher, student, batch)
    assert value < whole  # grouping hides differences
    shuffled = batch | {"teacher_tokens": batch["teacher_tokens"].roll(1, 1)}  # control: another token's teaching
    assert not close(loss_function(config)(student, shuffled)[0].detach(), plain.detach(), 1e-2)


def test_the_teacher_is_asked_once_for_runs_that_agree(data: Path, teacher: PreTrainedModel, tmp_path: Path) -> None:
    config = FinetuneConfig(loss="kd", teacher_top_k=4)
    first = stored(data, config, teacher, tmp_path)
    assert first.batch([47, 0])["teacher_tokens"].shape == (2, LENGTH, 4)
    assert torch.equal(first.batch([47, 0])["teacher_tokens"][1], first.batch([0])["teacher_tokens"][0])
    again = stored(data, config, None, tmp_path)  # type: ignore[arg-type]  # would fail if it were asked
    assert torch.equal(again.batch(ROWS)["teacher_tokens"], first.batch(ROWS)["teacher_tokens"])
    with pytest.raises(OSError, match="nothing of it was kept"):
        stored(data, FinetuneConfig(loss="kd", teacher_top_k=3), None, tmp_path)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_teacher_without_numbers_is_not_stored(data: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "teacher"))
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the teacher's logits are not finite on the training rows"):
        stored(data, FinetuneConfig(loss="kd", teacher_top_k=4), broken, tmp_path)
    assert not list(tmp_path.glob("teacher-*"))


def test_a_training_without_its_teacher_in_memory(tmp_path: Path) -> None:
    losses = {}
    for name, more in {"asked": [], "stored": [f"finetune.teacher_top_k={VOCAB}"]}.items():
        words = [*overrides(tmp_path, loss="kd"), "launch.device=cpu", f"name={name}", *more]
        plan = finished_stages(tmp_path, words)
        finetune.run(composed(words))
        history = json.loads((plan.finetune.folder / "history.json").read_text())
        losses[name] = torch.tensor([row["loss"] for row in history["train"]])
    assert losses["asked"][-1] != losses["asked"][0]
    assert close(losses["stored"], losses["asked"], 1e-4)


def test_only_kd_can_be_stored() -> None:
    for loss in ("ce", "kd+hidden"):
        with pytest.raises(ValueError, match="finetune.teacher_top_k=8 has no effect"):
            FinetuneConfig(loss=loss, teacher_top_k=8)
    with pytest.raises(ValueError, match="finetune.teacher_top_k=0 must be at least 1"):
        FinetuneConfig(loss="kd", teacher_top_k=0)
