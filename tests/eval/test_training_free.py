"""Studies of conversions without healing: every point at every cache size, and what the report says of them."""

import json
from pathlib import Path

import pytest

from eval.text import passages
from eval.training_free import chosen_points, run
from tests.eval.tiny import compose_config, write_original


def study(folder: Path, *words: str) -> list[str]:
    write_original(folder)
    text = folder / "text.txt"
    text.write_text("\n".join(passages()[:30]))
    sizes = ["study.tokens=256", "study.sequence_length=64", "calibration.tokens=256", "calibration.sequence_length=32"]
    return [f"study.text={text}", *sizes, *words]


def test_every_method_at_every_reduction(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # Sizes of a model with two key heads of eight: only these fit the presets as they are.
    config = compose_config(
        tmp_path,
        *study(tmp_path, "study=methods", "study.reductions=[0.25,0.5]", "study.points.best.reconstruction_steps=40"),
    )
    config.study.points["transmla"].rope_dim = config.study.points["care"].rope_dim = 4
    run.__wrapped__(config)
    found = json.loads((tmp_path / "out" / "model" / "methods.json").read_text())["rows"]
    assert found[0]["name"] == "original" and len(found) == 1 + 2 * 7
    by_rank = [row for row in found[1:] if row["bits_per_token"] is None]
    assert [row["reduction"] for row in by_rank] == [0.25] * 6 + [0.5] * 6
    [quarter, half] = [row["reduction"] for row in found[1:] if row["bits_per_token"]]
    assert quarter > 0.49 and half > 0.49  # 8 bits a channel are the most that a format has
    assert len({row["perplexity"] for row in by_rank}) == 12  # no two points gave the same model
    assert all(row["kl_divergence"] > 0 for row in found[1:])
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if "written" not in line) <= 80


def test_ingredients_differ_from_best_in_one_thing_each(tmp_path: Path) -> None:
    points = dict(chosen_points(compose_config(tmp_path, "study=ingredients").study))
    best = vars(points.pop("best"))
    assert len(points) == 5
    for name, point in points.items():
        assert sum(value != best[key] for key, value in vars(point).items()) == 1, name


def test_a_study_without_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="study.text=None"):
        run.__wrapped__(compose_config(tmp_path, "study=ingredients"))
