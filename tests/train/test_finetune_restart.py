"""The real module in processes of its own: killed and restarted, launched twice, launched on two processes."""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from conf.plan import Plan
from tests.train.tiny import composed, finished_stages, overrides, write_model
from train.finetune import run
from train.launch import launch_command

REPOSITORY = Path(__file__).parents[2]
STEPS = 60


class Project:
    """One output folder with converted model and data, and the command line of a fine-tuning in it."""

    def __init__(self, root: Path, **finetune):
        options = {"max_steps": STEPS, "epochs": 5, "eval_every": 20, "save_every": 7, **finetune}
        self.words = [*overrides(root, **options), "launch.device=cpu"]
        self.plan = finished_stages(root, self.words)
        self.folder = self.plan.finetune.folder

    def start(self, *words: str) -> subprocess.Popen:
        config = composed([*self.words, *words])
        command, variables = launch_command(config.launch, "train.finetune", [*self.words, *words])
        environment = os.environ | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)

    def kill_at(self, process: subprocess.Popen, step: int, pause: float = 0.005) -> None:
        """SIGKILL to the launcher and all its workers once the history has that step."""
        while self.last_step() < step and process.poll() is None:
            time.sleep(pause)
        assert process.poll() is None, process.communicate()[0]
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.kill()
        process.communicate()
        assert not self.plan.finetune.record() and not (self.folder / "config.json").exists()

    def run_here(self) -> dict[str, torch.Tensor]:
        run(composed(self.words))
        return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    def history(self) -> dict[str, list[dict[str, float]]]:
        return json.loads((self.folder / "history.json").read_text())

    def curve(self) -> torch.Tensor:
        """All numbers of the history but the speed."""
        history = self.history()
        numbers = [row[key] for row in history["train"] for key in ("loss", "grad_norm", "lr", "tokens")]
        return torch.tensor(numbers + [row["perplexity"] for row in history["validation"]], dtype=torch.float64)

    def last_step(self) -> int:
        try:
            return int(self.history()["train"][-1]["step"])
        except (FileNotFoundError, IndexError):
            return 0


def without_speed(history: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    return {
        group: [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
        for group, rows in history.items()
    }


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def distilled(root: Path, loss: str) -> dict[str, object]:
    """Options of a loss, with a teacher that is another model than the student."""
    if loss == "stored kd":
        return distilled(root, "kd") | {"teacher_top_k": 8}
    return {"loss": loss} | ({} if loss == "ce" else {"teacher": write_model(root / "teacher", seed=1)})


def test_a_distillation_resumes_exactly(tmp_path, monkeypatch):
    """The stage with the teacher it names, stopped before its result is written: it goes on from the checkpoint."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = {"max_steps": 12, **distilled(tmp_path, "kd+hidden")}
    whole = Project(tmp_path / "whole", **options)
    weights = whole.run_here()
    stopped = Project(tmp_path / "stopped", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.finetune.save_model", stop)
        stopped.run_here()
    assert [path.name for path in (stopped.folder / "checkpoints").iterdir()] == ["step-000007"]
    assert equal(stopped.run_here(), weights)
    assert without_speed(stopped.history()) == without_speed(whole.history())


def test_killed_at_a_random_step_ends_with_the_same_weights(tmp_path):
    """SIGKILL; weights bit for bit and every row of the history as of a run that nobody touched."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    killed = Project(tmp_path / "killed")
    killed.kill_at(killed.start(), chance.randint(8, STEPS - 5), pause=chance.random() * 0.01)
    process = killed.start()
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "going on after step" in output and "step 1/60" not in output
    assert killed.plan.finetune.record()["metrics"]["steps"] == STEPS
    assert not (killed.folder / "checkpoints").exists()

    whole = Project(tmp_path / "whole")
    process = whole.start()  # in a process too: one in which threads were set computes with others
    output = process.communicate()[0]
    assert process.returncode == 0, output
    weights = whole.weights()
    assert equal(killed.weights(), weights), f"seed {seed}"
    assert without_speed(killed.history()) == without_speed(whole.history()), f"seed {seed}"
    assert not equal(Project(tmp_path / "control", seed=1).run_here(), weights)


@pytest.mark.parametrize(
    "loss",
    ["ce", "stored kd", pytest.param("kd+hidden", marks=pytest.mark.slow)],  # one more start
)
def test_two_processes_train_like_one(tmp_path, loss):
    """The same curve to rounding, dropout included."""
    options = {"max_steps": 12, "micro_batch_size": 1}  # two micro-batches a step on each of two processes
    options |= distilled(tmp_path, loss)
    two = Project(tmp_path / "two", **options)
    process = two.start("launch.num_processes=2")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "on 2 x cpu" in output
    assert output.count("step 12/12  loss") == 1 and output.count("global_batch_size") == 1  # one process speaks
    assert two.plan.finetune.record()["metrics"]["processes"] == 2

    one, control = Project(tmp_path / "one", **options), Project(tmp_path / "control", **options, seed=1)
    one_weights, _ = one.run_here(), control.run_here()

    # Float32 sums in another order: measured differences up to 4e-6, of the control 0.2.
    torch.testing.assert_close(two.curve(), one.curve(), rtol=3e-5, atol=0)
    torch.testing.assert_close(two.weights(), one_weights, rtol=0, atol=1e-4)
    assert (control.curve() / one.curve() - 1).abs().max() > 0.05


@pytest.mark.slow  # one more start of two processes
def test_a_checkpoint_of_two_processes_continues_in_one(tmp_path, capsys):
    options = {"save_every": 5, "micro_batch_size": 1}
    project = Project(tmp_path / "killed", **options)
    project.kill_at(project.start("launch.num_processes=2"), 8)
    capsys.readouterr()
    weights = project.run_here()
    assert "going on after step" in capsys.readouterr().out
    assert project.plan.finetune.record()["metrics"]["processes"] == 1
    whole = Project(tmp_path / "whole", **options)
    torch.testing.assert_close(weights, whole.run_here(), rtol=0, atol=3e-4)  # measured 2e-5
    control = Project(tmp_path / "control", **options, seed=1)
    assert max((weights[name] - weight).abs().max() for name, weight in control.run_here().items()) > 0.01


def test_a_finished_stage_is_skipped_and_force_runs_it_again(tmp_path, capsys):
    project = Project(tmp_path, max_steps=3)
    project.run_here()
    capsys.readouterr()
    project.run_here()
    assert "finetune: finished in" in capsys.readouterr().out
    run(composed([*project.words, "force=true"]))
    assert "step 3/3" in capsys.readouterr().out
    aside = list(project.folder.parent.glob("finetune.old-*"))
    assert len(aside) == 1 and (aside[0] / "model.safetensors").exists()


def test_stages_before_it_must_be_finished(tmp_path):
    words = overrides(tmp_path)
    plan = finished_stages(tmp_path, words)
    (plan.sample.folder / "stage.json").unlink()
    with pytest.raises(FileNotFoundError, match="stage 'sample' .*has not finished; run `make sample`"):
        run(composed(words))
    assert not Plan(composed(words)).finetune.folder.exists()


def test_a_wrong_setting_does_not_move_a_finished_result(tmp_path):
    project = Project(tmp_path, max_steps=3)
    project.run_here()
    for word, message in (
        ("finetune.loss=kl", "finetune.loss=kl is unknown"),
        ("finetune.micro_batch_size=3", "finetune.global_batch_size=4 must be a multiple"),
        ("launch.num_processes=2", "2 processes were asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            run(composed([*project.words, word]))
        assert (project.folder / "model.safetensors").exists(), word
