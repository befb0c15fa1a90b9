"""What is said while work goes on, on a terminal and in a log; every stage says what it does before it does it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.progress import SILENCE, Pace, Progress, counted
from data import converse, sample
from eval import evaluate, report
from tests.data.corpora import documents, local, make_config, write_jsonl
from tests.eval.tiny import compose_config, finish_before_evaluation, write_original
from train import convert, export, finetune
from train.progress import Display


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_log_gets_a_line_at_once_and_after_every_silence(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("read", 1000, "tokens", clock) as progress:
        assert lines(capsys) == ["read: 0 of 1,000 tokens"]
        for _ in range(50):
            clock.now += 2
            progress.advance(20, "batch 3")
    said = lines(capsys)
    assert len(said) == 100 / SILENCE and said[0] == "read: 100 of 1,000 tokens, batch 3, 01:30 left"


def test_nothing_is_said_twice_within_a_silence_however_fast_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress("read", None, "characters", clock)
    for _ in range(1000):
        clock.now += 0.001
        progress.advance(5)
    progress.close()
    assert lines(capsys) == ["read: 0 characters"] and progress.done == 5000


def test_a_step_that_is_not_counted_speaks_too(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress("converse", 500, "tokens", clock)
    clock.now = SILENCE
    progress.advance(0, "batch 1 at token 7 of 128")
    assert lines(capsys)[1:] == ["converse: 0 of 500 tokens, batch 1 at token 7 of 128"]


def test_a_line_that_stays_breaks_the_silence(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress("healed", 100, "tokens", clock)
    clock.now = SILENCE - 1
    progress.line("passkey 50.0")
    clock.now = SILENCE + 1
    progress.advance(10)
    assert lines(capsys) == ["healed: 0 of 100 tokens", "healed: passkey 50.0 [9 s, 900 s left]"]


def test_more_than_there_is_counts_as_all(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("read", 10, "tokens")
    progress.advance(50)
    assert progress.done == 10


def test_a_terminal_gets_a_bar_and_no_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(counted(range(3), "factor", "layers")) == [0, 1, 2]
    shown = capsys.readouterr()
    assert "factor: 100%" in shown.err and shown.out == ""


def test_a_pace_counts_from_what_was_said_last() -> None:
    clock = Clock()
    pace = Pace(clock)
    found = []
    for clock.now in (9, 10, 19, 20, 45, 54):
        found.append(pace.due())
    assert found == [False, True, False, True, True, False]


def test_a_training_whose_logged_steps_are_far_apart_speaks_between_them(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = Display(1000, 0, shown=True)
    display.pace = Pace(clock)
    for step in range(1, 9):
        clock.now += 4
        display.note(f"step {step}, micro-batch 2 of 2")
        display.step(step, None, 5.0, 100.0)
    said = lines(capsys)
    assert len(said) == 2 and said[0].startswith("step 3, micro-batch 2") and said[1].startswith("step 6")
    clock.now += 1
    display.note("not yet")
    hidden = Display(1000, 0, shown=False)
    hidden.pace = Pace(clock)
    clock.now += 100
    hidden.note("of another process")
    assert not lines(capsys)


class Heavy(Exception):
    pass


def heavy(*_: object, **__: object) -> None:
    raise Heavy


def chat_run(folder: Path) -> object:
    from tests.data.test_converse import chat_model

    return chat_model(folder)


def text_run(folder: Path) -> object:
    return make_config(folder, {"a": local(write_jsonl(folder / "a.jsonl", documents(10)))})


def model_run(folder: Path) -> object:
    write_original(folder)
    return compose_config(folder)


def finished_run(folder: Path) -> object:
    config = model_run(folder)
    finish_before_evaluation(config)
    return config


def unhealed_run(folder: Path) -> object:
    """Converted and sampled."""
    config = model_run(folder)
    plan = finish_before_evaluation(config)
    (plan.finetune.folder / "stage.json").unlink()
    return config


STAGES: dict[str, tuple[Callable, str, Callable, str]] = {
    "converse": (chat_run, "data.converse.load", converse.converse, "converse: loading"),
    "sample": (text_run, "data.sample.load_tokenizer", sample.sample, "sample: opening"),
    "convert": (model_run, "train.convert.load_pretrained", convert.run.__wrapped__, "convert: loading"),
    "streamed": (model_run, "train.convert.checkpoint_folder", convert.run.__wrapped__, "convert: opening"),
    "finetune": (unhealed_run, "train.finetune.finetune", finetune.run, "finetune: loading"),
    "original": (finished_run, "eval.variants.load_model", evaluate.run_evaluate, "original: loading"),
    "evaluate": (finished_run, "eval.evaluate.prepare", evaluate.run_evaluate, "evaluate: preparing"),
    "report": (finished_run, "conf.stage.Stage.require_finished", report.run_report, "report: gathering"),
    "export": (finished_run, "train.export.load_model", export.run_export, "export: loading"),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_what_it_does_before_it_does_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, work, run, first = STAGES[name]
    config = prepare(tmp_path)
    if name == "streamed":
        monkeypatch.setattr("train.convert.is_streamed", lambda *_: True)
    monkeypatch.setattr(work, heavy)
    with pytest.raises(Heavy):
        run(config)
    assert any(line.startswith(first) for line in lines(capsys))
