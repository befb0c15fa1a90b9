"""The bench of training steps: what it writes, in ratios to cross-entropy, and that losses run apart."""

import json
import os

import pytest

from tests.train.tiny import composed, overrides, write_model
from train import bench


@pytest.fixture
def config(tmp_path):
    write_model(tmp_path / "pretrained")
    sizes = ["mla.rope_dim=8", "mla.kv_lora_rank=10", "data.sequence_length=16", "launch.device=cpu"]
    return composed([*overrides(tmp_path), *sizes, "bench.train_rounds=3", "bench.train_steps=2"])


def test_every_loss_against_cross_entropy(config, tmp_path, monkeypatch, capsys):
    asked = []

    def here(function, *arguments):
        """In this process, with memory that is known."""
        result = function(*arguments)
        if function is bench.train:
            asked.append(arguments[-1])
            result["memory_gib"] = {"ce": 2.0, "kd": 3.0, "kd+hidden": 5.0}[arguments[-1]]
        return result

    monkeypatch.setattr(bench, "alone", here)
    bench.run(config)
    assert asked == ["ce", "kd", "kd+hidden"] * 3
    result = json.loads((tmp_path / "outputs" / "pretrained" / "train_bench.json").read_text())
    assert result["tokens"] == [2, 16] and result["mixed_precision"] == "no" and result["provenance"]["versions"]
    rows = result["losses"]
    assert [rows[name]["memory_against_ce"] for name in rows] == [1.0, 1.5, 2.5]
    for row in rows.values():
        assert row["tokens_per_second"] == 32 / row["seconds_per_step"]
        wanted = result["flops_per_step"] / row["seconds_per_step"] / result["matrix_flops_per_second"]
        assert row["mfu"] == pytest.approx(wanted) and 0 < row["mfu"] < 1
        assert row["time_against_ce"] == row["seconds_per_step"] / rows["ce"]["seconds_per_step"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert any("1.50x" in line for line in lines) and max(map(len, lines[:-1])) <= 80


def test_each_training_has_a_process_of_its_own():
    assert len({os.getpid(), bench.alone(os.getpid), bench.alone(os.getpid)}) == 3
