"""The losses against plain ones over whole logits, and what learning from a teacher does and leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from conf.schema import FinetuneConfig
from mha2mla import ConversionOptions, output_head
from tests.train.test_finetune_loop import Runs
from tests.train.tiny import VOCAB, write_data, write_model
from train.batches import PackedRows
from train.distillation import relative_error
from train.losses import LOSSES, cross_entropy, loss_function
from train.rowwise import sum_over_rows
from train.targets import IGNORE, Batch, forward
from train.teacher import check_teacher

MLA = ConversionOptions(rope_dim=8, kv_lora_rank=10)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Four rows of 32 tokens, some of them without a target: 128 rows of logits."""
    return PackedRows(write_data(tmp_path_factory.mktemp("data")), "train", VOCAB).batch([0, 1, 2, 3])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path_factory.mktemp("teacher"), dropout=0.0))
    return model.eval().requires_grad_(False)


@pytest.fixture
def student(tmp_path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "student", dropout=0.0, mla=MLA))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 24 rows: several of them, and a last one that is not full."""
    monkeypatch.setattr(output_head, "ROWS", {"cpu": 24})


def plain_loss(config: FinetuneConfig, teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> Tensor:
    """What the losses compute, by torch's own functions over whole logits."""
    keep, t = batch["labels"] != IGNORE, config.kd_temperature
    with torch.no_grad():
        wanted = forward(teacher, batch, output_hidden_states=True)
    found = forward(student, batch, output_hidden_states=True)
    if config.loss == "ce":
        return F.cross_entropy(found.logits[keep].float(), batch["labels"][keep], reduction="sum")
    scores, targets = ((output.logits[keep].float() / t).log_softmax(-1) for output in (found, wanted))
    loss = t**2 * F.kl_div(scores, targets, log_target=True, reduction="sum")
    if config.loss == "kd+hidden":
        pairs = zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True)
        pairs = ((ours[keep].float(), theirs[keep].float()) for ours, theirs in pairs)
        errors = [((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().sum() for ours, theirs in pairs]
        loss = loss + config.hidden_weight * torch.stack(errors).mean()
    return loss


def gradients(loss: Tensor, model: PreTrainedModel) -> Tensor:
    model.zero_grad()
    (loss / 100).backward()  # scaled, as the loop does
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]).float()


def close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((got - wanted).norm() <= tolerance * wanted.norm())


CONFIGS = {
    "ce": FinetuneConfig(),
    "kd": FinetuneConfig(loss="kd"),
    "kd, t 2": FinetuneConfig(loss="kd", kd_temperature=2.0),
    "kd+hidden": FinetuneConfig(loss="kd+hidden", hidden_weight=3.0, kd_temperature=0.7),
}


def distil(config: FinetuneConfig, teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch):
    return loss_function(config, None if config.loss == "ce" else teacher)(student, batch)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradient_are_those_of_the_plain_loss(config, teacher, student, batch):
    loss, targets = distil(config, teacher, student, batch)
    assert int(targets) == int((batch["labels"] != IGNORE).sum()) < batch["labels"].numel() - 4
    gradient, value = gradients(loss, student), loss.detach()
    plain = plain_loss(config, teacher, student, batch)
    plain_gradient = gradients(plain, student)
    assert close(value, plain.detach(), 1e-6) and close(gradient, plain_gradient, 1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_in_bfloat16(config, teacher, student, batch):
    """Models, hidden states and gradients in bfloat16, whose numbers are 4e-3 apart; sums stay in float32.

    Measured: losses within 2e-6, gradients within 7e-3 (of the plain loss too the last step is bfloat16).
    """
    teacher, student = copy.deepcopy(teacher).bfloat16(), student.bfloat16()
    loss, _ = distil(config, teacher, student, batch)
    gradient, value = gradients(loss, student), loss.detach()
    plain = plain_loss(config, teacher, student, batch)
    assert close(value, plain.detach(), 1e-5)
    assert close(gradient, gradients(plain, student), 2e-2)


@pytest.mark.parametrize("broken", ["temperature", "offset", "mask"])
def test_the_comparison_notices(broken, teacher, student, batch, monkeypatch):
    """Controls: the differences that the exactness tests must not miss."""
    config = CONFIGS["kd, t 2"]
    plain = plain_loss(config, teacher, student, batch)
    plain_gradient, other = gradients(plain, student), dict(batch)
    if broken == "temperature":
        config = FinetuneConfig(loss="kd", kd_temperature=2.2)
    elif broken == "mask":
        other["labels"] = batch["labels"].clamp(min=0)
    else:
        head = teacher.get_output_embeddings()
        right = head.forward
        monkeypatch.setattr(head, "forward", lambda states: right(states.roll(1, -2)))
    loss, _ = distil(config, teacher, student, other)
    gradient = gradients(loss, student)
    assert not close(loss.detach(), plain.detach(), 1e-4) and not close(gradient, plain_gradient, 1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_positions_without_a_target_get_no_gradient(name, teacher, student, batch):
    kept = {}

    def keep_gradient(module, inputs, output):
        output.logits.register_hook(lambda gradient: kept.update(gradient=gradient.clone()))

    student.register_forward_hook(keep_gradient)
    distil(FinetuneConfig(loss=name), teacher, student, batch)[0].backward()
    ignored = batch["labels"] == IGNORE
    assert not kept["gradient"][ignored].any() and kept["gradient"][~ignored].any(-1).all()


def test_a_teacher_that_caps_its_logits_is_asked_for_them(batch, student):
    """Its head alone gives others: the control is that the cap matters."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5}
    teacher = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=2.0, **sizes, **options)).eval()
    config = CONFIGS["kd"]
    loss, _ = distil(config, teacher, student, batch)
    assert close(loss.detach(), plain_loss(config, teacher, student, batch).detach(), 1e-6)
    capless = copy.deepcopy(teacher)
    capless.config.final_logit_softcapping = None
    assert not close(distil(config, capless, student, batch)[0].detach(), loss.detach(), 1e-2)


def test_a_student_that_caps_its_logits(batch, teacher):
    """The gradient goes back through what follows the head."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5}
    student = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=2.0, **sizes, **options))
    for config in (CONFIGS["ce"], CONFIGS["kd"]):
        gradient = gradients(distil(config, teacher, student, batch)[0], student)
        assert close(gradient, gradients(plain_loss(config, teacher, student, batch), student), 1e-6)


def test_logits_are_left_alone_without_gradients_and_used_up_with_them():
    logits = torch.randn(50, 7)

    def row_loss(rows: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        return rows.exp().sum(), rows.exp()

    before = logits.clone()
    assert torch.equal(sum_over_rows(logits, row_loss), sum_over_rows(before, row_loss))
    assert torch.equal(logits, before)
    leaf = before.clone().requires_grad_()
    with torch.no_grad():
        sum_over_rows(leaf, row_loss)
    assert torch.equal(leaf, before)

    loss = sum_over_rows(leaf * 1, row_loss)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, before.exp())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # would scale the gradient twice
    # An operation that needs its own output, the logits, for its backward.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum_over_rows(leaf.exp(), row_loss).backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sum_over_rows(leaf * 1, row_loss), leaf, create_graph=True)


@pytest.mark.parametrize("name", ["kd", "kd+hidden"])
def test_a_student_like_its_teacher_has_nothing_to_learn(name, teacher, student, batch):
    config = FinetuneConfig(loss=name)
    same = copy.deepcopy(teacher).requires_grad_(True)
    loss, targets = distil(config, teacher, same, batch)
    assert loss.abs() < 1e-5 * targets and gradients(loss, same).abs().max() < 1e-6
    other, _ = distil(config, teacher, student, batch)
    assert other > 0.1 * targets and gradients(other, student).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["kd", "kd+hidden"])
def test_training_follows_the_teacher_and_leaves_it_alone(tmp_path, teacher, name):
    runs = Runs(tmp_path, dropout=0.0, mla=MLA)
    before = copy.deepcopy(teacher.state_dict())
    runs.teacher = teacher
    metrics = runs("out", loss=name, learning_rate=1e-2, epochs=3)
    losses = runs.losses("out")
    assert losses[-3:].mean() < 0.7 * losses[:3].mean() and metrics["validation_perplexity"] > 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize("name", ["kd", "kd+hidden"])
def test_micro_batches_and_gradient_checkpointing_change_nothing(tmp_path, teacher, name):
    runs = Runs(tmp_path, dropout=0.0, mla=MLA)
    runs.teacher = teacher
    runs("whole", loss=name, micro_batch_size=4)
    runs("single", loss=name, micro_batch_size=1)
    runs("checkpointed", loss=name, micro_batch_size=4, gradient_checkpointing=True)
    runs("control", loss=name, micro_batch_size=4, seed=1)
    torch.testing.assert_close(runs.losses("single"), runs.losses("whole"), rtol=1e-5, atol=0)
    assert torch.equal(runs.losses("checkpointed"), runs.losses("whole"))
    assert (runs.losses("control") / runs.losses("whole") - 1).abs().max() > 0.01


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, teacher):
    runs = Runs(tmp_path, mla=MLA)
    larger = copy.deepcopy(teacher)
    larger.resize_token_embeddings(VOCAB + 8)
    runs.teacher = larger
    with pytest.raises(ValueError, match="the teacher has 72 tokens and the model 64; .*finetune.teacher.* or .*=ce"):
        runs("out", loss="kd")
    assert list((tmp_path / "out").iterdir()) == []
    shallow = copy.deepcopy(teacher)
    shallow.config.num_hidden_layers = 1
    check_teacher(shallow, teacher, "kd")
    with pytest.raises(ValueError, match="the teacher has 1 num_hidden_layers and the model 2; .*finetune.loss=kd,"):
        check_teacher(shallow, teacher, "kd+hidden")


def test_cross_entropy_in_validation_keeps_no_gradient(student, batch):
    with torch.no_grad():
        loss, _ = cross_entropy(student, batch)
    assert not loss.requires_grad
    assert close(loss, plain_loss(CONFIGS["ce"], student, student, batch).detach(), 1e-6)


def test_states_of_zeros_have_no_relative_error_and_no_gradient() -> None:
    student = (torch.ones(1, 3, 4, requires_grad=True),)
    teacher = (torch.ones(1, 3, 4).mul_(torch.tensor([2.0, 0.0, 1.0])[:, None]),)
    error = relative_error(student, teacher, torch.ones(1, 3, dtype=torch.bool))
    error.backward()
    assert float(error.detach()) == 0.25 and student[0].grad is not None and student[0].grad[0, 1:].eq(0).all()
