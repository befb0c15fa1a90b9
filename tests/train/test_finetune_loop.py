"""The training loop in this process: what it changes, what it writes, what it refuses."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.schema import Device, FinetuneConfig, LaunchConfig, LoraConfig, Precision, Trainable
from eval.perplexity import perplexity
from mha2mla import ConversionOptions
from tests.train.tiny import VOCAB, write_data, write_model
from train.batches import TextRows
from train.finetune import finetune
from train.launch import start
from train.losses import cross_entropy


def settings(**changes) -> FinetuneConfig:
    options = {
        "learning_rate": 3e-3,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "mixed_precision": Precision.no,
        "log_every": 1,
        "eval_every": 5,
        "save_every": 3,
    }
    return FinetuneConfig(**(options | changes))


class Runs:
    """Fine-tunings of one tiny model on one data folder, each into a folder of its own."""

    def __init__(self, root: Path, **model):
        self.root, self.model_dir, self.data_dir = root, root / "convert", root / "data"
        self.teacher = None  # of losses that need one
        self.text = None  # another text to measure
        write_model(self.model_dir, **model)
        write_data(self.data_dir)

    def __call__(self, name: str, **changes) -> dict:
        config = settings(**changes)
        output = self.root / name
        output.mkdir(exist_ok=True)
        accelerator = start(config, LaunchConfig(device=Device.cpu))
        return finetune(self.model_dir, self.data_dir, output, config, accelerator, None, self.teacher, self.text)

    def history(self, name: str) -> dict:
        return json.loads((self.root / name / "history.json").read_text())

    def losses(self, name: str) -> torch.Tensor:
        return torch.tensor([row["loss"] for row in self.history(name)["train"]], dtype=torch.float64)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / name / "model.safetensors")


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path, dropout=0.0)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_training_learns_and_leaves_an_ordinary_checkpoint(tmp_path):
    runs = Runs(tmp_path, dtype=torch.bfloat16)
    metrics = runs("out")
    assert metrics["steps"] == 12 and metrics["tokens"] == 12 * 4 * 32
    assert metrics["validation_perplexity"] < 0.5 * metrics["validation_perplexity_start"]
    history = runs.history("out")
    assert [row["step"] for row in history["train"]] == list(range(1, 13))
    assert [row["step"] for row in history["validation"]] == [0, 5, 10, 12]
    assert set(history["train"][0]) == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert history["validation"][-1]["perplexity"] == metrics["validation_perplexity"]
    assert metrics["validation_perplexity_best"] == min(row["perplexity"] for row in history["validation"])

    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert healed.dtype == torch.bfloat16 and type(healed).__name__ == "LlamaForCausalLM"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == VOCAB
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name != "checkpoints"]


def test_another_text_is_measured_as_evaluation_does(runs):
    ids = torch.randint(3, VOCAB, (5, 16), generator=torch.Generator().manual_seed(1))
    runs.text = TextRows("poem", ids)
    runs("out")
    rows = runs.history("out")["validation"]
    healed = AutoModelForCausalLM.from_pretrained(runs.root / "out")
    assert len(rows) == 4 and rows[0]["text_perplexity"] != rows[-1]["text_perplexity"]
    assert rows[-1]["text_perplexity"] == pytest.approx(perplexity(healed, list(ids)), rel=1e-4)
    runs.text = None
    runs("without")
    assert torch.equal(runs.losses("out"), runs.losses("without"))


def test_rows_are_means_over_the_steps_since_the_last(runs):
    runs("each", log_every=1)
    runs("third", log_every=5)
    assert [row["step"] for row in runs.history("third")["train"]] == [5, 10, 12]
    steps = runs.losses("each")
    # By target tokens, whose number differs a little from step to step.
    torch.testing.assert_close(runs.losses("third")[0], steps[:5].mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(runs.losses("third")[2], steps[10:].mean(), rtol=0.02, atol=0)


def test_micro_batches_change_nothing(runs):
    """Rows have different numbers of targets: a mean over means would differ (measured: by 5e-3)."""
    runs("whole", micro_batch_size=4)
    runs("single", micro_batch_size=1)
    runs("control", micro_batch_size=4, seed=1)
    torch.testing.assert_close(runs.losses("single"), runs.losses("whole"), rtol=1e-5, atol=0)
    torch.testing.assert_close(runs.weights("single"), runs.weights("whole"), rtol=0, atol=1e-4)
    assert (runs.losses("control") - runs.losses("whole")).abs().max() > 0.05


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = Runs(tmp_path)  # with dropout
    runs("plain")
    runs("checkpointed", gradient_checkpointing=True)
    assert torch.equal(runs.losses("plain"), runs.losses("checkpointed"))


def test_only_the_attention_trains(runs):
    metrics = runs("out", trainable=Trainable.attention)
    names = changed(load_file(runs.model_dir / "model.safetensors"), runs.weights("out"))
    assert names == {name for name in runs.weights("out") if ".self_attn." in name}
    assert len(names) == 8 and metrics["trained_parameters"] == 2 * (2 * 32 * 32 + 2 * 16 * 32)


def test_lora_is_merged_into_an_ordinary_checkpoint(runs):
    metrics = runs("out", trainable=Trainable.lora, lora=LoraConfig(r=3), learning_rate=3e-2)
    before, after = load_file(runs.model_dir / "model.safetensors"), runs.weights("out")
    names = changed(before, after)
    assert names == {name for name in after if ".self_attn." in name and name.endswith("_proj.weight")}
    ranks = {int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)) for name in names}
    assert ranks == {3}
    # What is saved is what was measured in training.
    healed = AutoModelForCausalLM.from_pretrained(runs.root / "out")
    healed.save_pretrained(runs.root / "again")
    AutoTokenizer.from_pretrained(runs.root / "out").save_pretrained(runs.root / "again")
    runs.model_dir = runs.root / "again"
    again = runs("check", max_steps=1)
    assert again["validation_perplexity_start"] == pytest.approx(metrics["validation_perplexity"], rel=1e-5)


@pytest.mark.parametrize("trainable", [Trainable.attention, Trainable.lora])
def test_a_converted_model_heals_and_stays_what_it_is(tmp_path, trainable):
    runs = Runs(tmp_path, mla=ConversionOptions(rope_dim=8, kv_lora_rank=10, q_lora_rank=12))
    metrics = runs("out", trainable=trainable, learning_rate=1e-2, lora=LoraConfig(r=4))
    assert metrics["validation_perplexity"] < 0.7 * metrics["validation_perplexity_start"]
    names = changed(load_file(runs.model_dir / "model.safetensors"), runs.weights("out"))
    projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert names == {f"model.layers.{i}.self_attn.{name}.weight" for i in range(2) for name in projections}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (runs.model_dir, runs.root / "out")]
    assert configs[0] == configs[1]
    assert {path.name for path in runs.model_dir.iterdir()} < {path.name for path in (runs.root / "out").iterdir()}
    assert type(AutoModelForCausalLM.from_pretrained(runs.root / "out")).__name__ == "LlamaMLAForCausalLM"


def test_lora_resumes_exactly(runs):
    options = {"trainable": Trainable.lora, "lora": LoraConfig(r=2, lora_dropout=0.1), "keep_checkpoints": 4}
    runs("out", **options)
    whole = runs.weights("out")
    for folder in ("step-000009", "step-000012"):
        shutil.rmtree(runs.root / "out" / "checkpoints" / folder)
    runs("out", **options)
    assert not changed(whole, runs.weights("out"))


def test_old_and_half_written_checkpoints_are_removed(runs):
    folder = runs.root / "out" / "checkpoints"
    (folder / "step-000099.tmp").mkdir(parents=True)
    (folder / "step-000099.tmp" / "model.safetensors").write_text("half")
    runs("out", keep_checkpoints=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000009", "step-000012"]


@pytest.mark.slow  # compiling takes most of a minute
@pytest.mark.parametrize("loss", ["ce", "kd+hidden"])
def test_compiling_changes_nothing(runs, loss):
    if loss != "ce":
        folder = write_model(runs.root / "teacher", seed=1)
        runs.teacher = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    runs("plain", loss=loss)
    runs("compiled", loss=loss, torch_compile=True)
    torch.testing.assert_close(runs.losses("compiled"), runs.losses("plain"), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "kl"}, "finetune.loss=kl is unknown; there are: ce, kd, kd.hidden$"),
        ({"global_batch_size": 6, "micro_batch_size": 4}, "finetune.global_batch_size=6 must be a multiple"),
        ({"max_steps": 13}, "finetune.max_steps=13, but 48 sequences of 32 tokens x finetune.epochs=1 give 12 steps"),
        ({"global_batch_size": 50, "micro_batch_size": 50}, "give 0 steps"),
        ({"learning_rate": 1e30}, "training diverged in step 2"),
    ],
)
def test_settings_that_cannot_work(runs, changes, message):
    with pytest.raises(ValueError, match=message):
        runs("out", **changes)
    assert not (runs.root / "out" / "config.json").exists()


def test_a_training_that_diverges_names_the_last_checkpoint(runs, monkeypatch):
    with pytest.raises(ValueError, match="training diverged in step 2 .*; there is no checkpoint yet$"):
        runs("none", learning_rate=1e30, save_every=5)
    seen = []

    def late(model, batch):
        seen.append(len(seen))
        return [cross_entropy(model, batch)[0] * (torch.nan if len(seen) > 8 else 1), None]  # two of a step

    monkeypatch.setattr("train.finetune.loss_function", lambda config, teacher: late)
    last = runs.root / "late" / "checkpoints" / "step-000003"
    with pytest.raises(ValueError, match=f"training diverged in step 5 .loss nan.*; the last checkpoint is {last}$"):
        runs("late", save_every=3)
    assert [path.name for path in last.parent.iterdir()] == ["step-000003"]
    assert all(weight.isfinite().all() for weight in load_file(last / "model.safetensors").values())


def test_a_model_or_teacher_without_numbers_is_not_trained_on(runs):
    weights = load_file(runs.model_dir / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    runs.teacher = AutoModelForCausalLM.from_pretrained(runs.model_dir).eval().requires_grad_(False)
    runs.teacher.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="training cannot begin in step 1 .*of the model or of its teacher"):
        runs("taught", loss="kd")
    runs.teacher = None
    save_file(weights, runs.model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the model's loss on validation text is nan after 0 steps: .*make convert"):
        runs("out")
    assert not (runs.root / "out" / "history.json").exists()


def test_a_truncated_checkpoint_is_refused(runs):
    file = runs.model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="holds no complete checkpoint .*make convert"):
        runs("out")


def test_a_checkpoint_without_one_weight_is_refused(runs):
    weights = load_file(runs.model_dir / "model.safetensors")
    weights.pop("model.layers.1.self_attn.o_proj.weight")
    save_file(weights, runs.model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weight .model.layers.1.self_attn.o_proj.weight"):
        runs("out")


@pytest.fixture
def small_disk():
    """No file may grow beyond 40 kB (the optimiser state does, the weights of 83 kB do): what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit=40_000: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_that_looks_finished(runs, small_disk):
    runs("warm", max_steps=1)  # the data's cache is there
    small_disk()
    with pytest.raises(OSError, match="could not write .*step-000003"):
        runs("out")
    assert list((runs.root / "out" / "checkpoints").iterdir()) == []
    with pytest.raises(OSError, match="could not write .*saving"):
        runs("out", save_every=100)
    assert sorted(path.name for path in (runs.root / "out").iterdir()) == ["checkpoints", "history.json"]
    small_disk(10_000_000)
    assert runs("out")["steps"] == 12
    assert AutoModelForCausalLM.from_pretrained(runs.root / "out")
