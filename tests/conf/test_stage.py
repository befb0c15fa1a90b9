"""A stage's folder: finished only when sealed, skipped only for the same configuration and inputs, never lost."""

import threading
from pathlib import Path

import pytest

from conf.stage import Stage, fingerprint, read_record


def stage(folder: Path, **config: object) -> Stage:
    return Stage("convert", folder / "convert", dict(config), {"model": "abc"})


def test_sealed_is_finished_and_carries_provenance(tmp_path: Path) -> None:
    with stage(tmp_path, r=1).run() as running:
        (running.folder / "result").write_text("x")
        running.metrics["score"] = 3
        assert stage(tmp_path, r=1).record() is None
    record = stage(tmp_path, r=1).require_finished()
    assert record["metrics"] == {"score": 3}
    assert record["provenance"]["versions"]["torch"] and record["provenance"]["hardware"]["cores"] >= 1
    assert (tmp_path / "convert" / "config.yaml").read_text() == "r: 1\n"


def test_failing_body_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stage(tmp_path).run() as running:
        (running.folder / "model").write_text("half")
        raise RuntimeError
    assert stage(tmp_path).record() is None
    with pytest.raises(FileNotFoundError, match="has not finished.*make convert"):
        stage(tmp_path).require_finished()


def test_other_configuration_or_input_is_not_finished_and_is_kept_aside(tmp_path: Path) -> None:
    with stage(tmp_path, r=1).run() as running:
        (running.folder / "result").write_text("first")
    other = stage(tmp_path, r=2)
    assert not other.skip()
    with pytest.raises(FileNotFoundError, match="another configuration"):
        other.require_finished()
    changed_input = Stage("convert", tmp_path / "convert", {"r": 1}, {"model": "xyz"})
    assert not changed_input.skip() and stage(tmp_path, r=1).skip()
    with other.run():
        pass
    [aside] = tmp_path.glob("convert.old-*")
    assert (aside / "result").read_text() == "first" and read_record(aside)


def test_results_that_are_made_within_one_second_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conf.stage.time.strftime", lambda *_: "20260101-000000")
    for r in range(4):
        with stage(tmp_path, r=r).run() as running:
            (running.folder / "result").write_text(str(r))
    assert sorted((aside / "result").read_text() for aside in tmp_path.glob("convert.old-*")) == ["0", "1", "2"]


def test_unfinished_folder_is_resumed_only_by_the_same_run(tmp_path: Path) -> None:
    def interrupted(config: dict, resumable: bool) -> bool:
        """Whether the file of an interrupted run is still there when it starts again."""
        with pytest.raises(KeyboardInterrupt), stage(tmp_path, **config).run(resumable=resumable) as running:
            found = (running.folder / "checkpoint").exists()
            (running.folder / "checkpoint").write_text("x")
            raise KeyboardInterrupt
        return found

    assert not interrupted({"r": 1}, resumable=True)
    assert interrupted({"r": 1}, resumable=True)
    assert not interrupted({"r": 2}, resumable=True)
    assert not interrupted({"r": 2}, resumable=False)


def test_force_runs_again(tmp_path: Path) -> None:
    with stage(tmp_path).run():
        pass
    assert stage(tmp_path).skip() and not stage(tmp_path).skip(force=True)


def test_truncated_record_is_no_record(tmp_path: Path) -> None:
    with stage(tmp_path).run():
        pass
    path = tmp_path / "convert" / "stage.json"
    path.write_text(path.read_text()[:-40])
    assert stage(tmp_path).record() is None


def test_fingerprint_sees_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "a").write_text("two")
    second = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, fingerprint(tmp_path)}) == 3
    with pytest.raises(FileNotFoundError, match="missing does not exist or is empty"):
        fingerprint(tmp_path / "missing")


def test_what_changed_is_said_when_an_earlier_result_is_moved_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with stage(tmp_path, mla={"r": 1, "R": 8}, seed=0).run():
        (tmp_path / "convert" / "result").write_text("first")
    with stage(tmp_path, mla={"r": 2, "R": 8, "new": True}, seed=0).run():
        pass
    out = capsys.readouterr().out
    assert "(mla.r: 1 -> 2, mla.new: unset -> True)" in out and "mla.R" not in out and "seed" not in out


def test_only_one_run_at_a_time_makes_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of a sweep that a cluster runs side by side share the sample and the original's scores."""
    order, waits = [], threading.Event()

    def said(text: str, **_: object) -> None:
        if "another run is making" in text:
            waits.set()

    monkeypatch.setattr("builtins.print", said)

    def make(name: str) -> None:
        with stage(tmp_path).alone():
            if not stage(tmp_path).record():
                with stage(tmp_path).run() as running:
                    order.append(f"{name} makes it")
                    assert waits.wait(60), "nobody waits for it"
                    (running.folder / "result").write_text(name)
            else:
                order.append(f"{name} finds it")

    threads = [threading.Thread(target=make, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(word.split()[1] for word in order) == ["finds", "makes"] and order[0].endswith("makes it")


def test_what_a_restart_needs_goes_with_the_seal_or_after_a_kill_behind_it(tmp_path: Path) -> None:
    def one(**config: object) -> Stage:
        return Stage("finetune", tmp_path / "finetune", dict(config), {}, unfinished=("checkpoints",))

    with one().run(resumable=True) as running:
        (running.folder / "checkpoints").mkdir()
        (running.folder / "model").write_text("whole")
    names = sorted(path.name for path in (tmp_path / "finetune").iterdir())
    assert names == ["config.yaml", "model", "stage.json"]
    # As a kill between the record and the clearing leaves it.
    (tmp_path / "finetune" / "checkpoints").mkdir()
    (tmp_path / "finetune" / ".key").write_text(one().key)
    assert one().skip()
    assert sorted(path.name for path in (tmp_path / "finetune").iterdir()) == names


@pytest.mark.parametrize("other", [{"r": 2}, {}], ids=["another configuration", "force"])
def test_a_finished_result_is_kept_aside_although_its_mark_was_left(other: dict[str, object], tmp_path: Path) -> None:
    with stage(tmp_path).run() as running:
        (running.folder / "result").write_text("first")
    (tmp_path / "convert" / ".key").write_text(stage(tmp_path).key)
    with stage(tmp_path, **other).run(force=True):
        pass
    [aside] = tmp_path.glob("convert.old-*")
    assert (aside / "result").read_text() == "first"
