"""Healing curves from what fine-tunings left on disk."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from eval.healing import healing_curve, main, saved_tokens, times_fewer, tokens_to_reach

CURVE = [(0, 100.0, 50.0), (1000, 60.0, 40.0), (2000, 45.0, 35.0)]


def write_run(folder: Path, curve: list[tuple[int, float, float]], text: bool = True, **settings: object) -> Path:
    for stage in ("convert", "finetune"):
        (folder / stage).mkdir(parents=True)
    used = {"loss": "kd", "trainable": "attention", "learning_rate": 1e-3, "global_batch_size": 4} | settings
    rows = [
        {"step": step, "tokens": tokens, "loss": 1.0, "perplexity": own} | ({"text_perplexity": other} if text else {})
        for step, (tokens, other, own) in enumerate(curve)
    ]
    metrics = {"tokens": curve[-1][0], "steps": 2, "tokens_per_second": 200.0, "mixed_precision": "no"}
    (folder / "convert" / "stage.json").write_text(json.dumps({"metrics": {"calibration_tokens": 500}}))
    (folder / "convert" / "conversion.json").write_text(json.dumps({"reduction": 0.6875}))
    (folder / "finetune" / "config.yaml").write_text(yaml.safe_dump({"finetune": used}))
    (folder / "finetune" / "history.json").write_text(json.dumps({"validation": rows}))
    (folder / "finetune" / "stage.json").write_text(json.dumps({"metrics": metrics, "provenance": {"commit": "abc"}}))
    return folder


def test_curves_of_runs_become_json_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / "a", CURVE), write_run(tmp_path / "mha2mla", [(0, 900.0, 800.0), (4000, 70.0, 60.0)])]
    monkeypatch.setattr(sys, "argv", ["healing", *map(str, runs), "--output", str(tmp_path / "out" / "healing")])
    main()
    found = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert [row["name"] for row in found["runs"]] == ["a", "mha2mla"] and found["provenance"] == {"commit": "abc"}
    assert found["runs"][0]["curve"] == [list(point) for point in CURVE]
    # 4,000 tokens and 500 of calibration brought the reference below the 100 that calibration alone gave.
    saved = {"reference": "mha2mla", "perplexity": 100.0, "tokens": 500, "times_fewer": 9.0, "at_least": False}
    assert found["runs"][0]["saved"] == saved
    assert found["runs"][1]["saved"] is None
    assert (tmp_path / "out" / "healing.png").stat().st_size > 10_000


def test_a_reference_that_never_comes_so_far_gives_a_lower_bound(tmp_path: Path) -> None:
    ours = healing_curve(write_run(tmp_path / "a", CURVE))
    far = healing_curve(
        write_run(tmp_path / "mha2mla", [(0, 900.0, 800.0), (2500, 300.0, 200.0), (3500, 310.0, 210.0)])
    )
    saved = saved_tokens(ours, [ours, far], "mha2mla")
    assert saved == {"reference": "mha2mla", "perplexity": 100.0, "tokens": 500, "times_fewer": 8.0, "at_least": True}
    assert times_fewer(saved) == ">= 8.0x"
    assert saved_tokens(far, [ours, far], "mha2mla") is None


def test_runs_of_another_precision_are_no_reference(tmp_path: Path) -> None:
    ours, other = (healing_curve(write_run(tmp_path / name, CURVE)) for name in ("a", "mha2mla"))
    assert saved_tokens(ours, [ours, other], "mha2mla")
    assert saved_tokens(ours, [ours, other | {"mixed_precision": "bf16"}], "mha2mla") is None


def test_tokens_to_reach_is_a_measured_point_or_none() -> None:
    curve = [list(point) for point in CURVE]
    assert tokens_to_reach(curve, 60.0) == 1000 and tokens_to_reach(curve, 59.0) == 2000
    assert tokens_to_reach(curve, 44.0) is None


def test_unfinished_runs_and_runs_without_a_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished fine-tuning"):
        healing_curve(tmp_path / "nothing")
    with pytest.raises(ValueError, match="eval.perplexity_text"):
        healing_curve(write_run(tmp_path / "c", CURVE, text=False))
