"""The bench of decoding: every variant against the original, and a cache of the size that was asked for."""

import json
from pathlib import Path

import pytest
import torch

from conf.errors import StageError
from conf.memory import held_bytes, peak_bytes, reset_peak
from eval.bench import run
from eval.decoding import Decoding
from tests.train.tiny import composed, overrides, write_model

SIZES = ["mla.rope_dim=8", "mla.kv_lora_rank=10", "launch.device=cpu", "bench.dtype=float32"]
BENCH = ["bench.contexts=[300,150]", "bench.batch_sizes=[2]", "bench.steps=2", "bench.rounds=2"]


def test_ratios_of_caches_are_the_same_in_every_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.bench.copy_bandwidth", lambda device: 1.0)
    write_model(tmp_path / "pretrained")
    found = {}
    for dtype in ("float32", "bfloat16"):
        words = [*SIZES, *BENCH, "bench.contexts=[150]", f"bench.dtype={dtype}", "bench.rounds=1"]
        run.__wrapped__(composed([*overrides(tmp_path), *words]))
        found[dtype] = json.loads((tmp_path / "outputs" / "pretrained" / "bench.json").read_text())
    first, second = (result["grid"][0]["variants"] for result in found.values())
    for name, row in first.items():
        assert row["cache_against_original"] == second[name]["cache_against_original"], name
    held = [rows["4 bits"]["cache_bytes"] / rows["original"]["cache_bytes"] for rows in (first, second)]
    assert held[1] > 1.2 * held[0]  # control: bytes as they are held say another reduction on every machine
    assert [result["bench"]["dtype"] for result in found.values()] == ["float32", "bfloat16"]
    assert found["float32"]["bench"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("prefill", [True, False])
def test_every_variant_against_the_original(tmp_path: Path, capsys, prefill: bool) -> None:
    write_model(tmp_path / "pretrained")
    run.__wrapped__(composed([*overrides(tmp_path), *SIZES, *BENCH, f"bench.prefill={prefill}"]))
    result = json.loads((tmp_path / "outputs" / "pretrained" / "bench.json").read_text())
    assert [(place["context"], place["batch"]) for place in result["grid"]] == [(300, 2), (150, 2)]
    rows = result["grid"][0]["variants"]
    assert list(rows) == ["original", "expanded", "absorbed", "4 bits", "4 bits, calibrated"]
    assert rows["original"]["speed_against_original"] == 1
    # 18 numbers of the 32 that two heads of eight keys and values hold.
    assert rows["absorbed"]["cache_against_original"] == rows["expanded"]["cache_against_original"] == 18 / 32
    # Nearly all tokens are coded: 5 bytes and two halves of the latent, 8 and two halves of the rotated key, of 32 x 2.
    assert 21 / 64 < rows["4 bits"]["cache_against_original"] < 0.7
    assert rows["4 bits, calibrated"]["cache_bytes"] < rows["4 bits"]["cache_bytes"]
    assert all(row["tokens_per_second"] > 0 and row["bandwidth_share"] > 0 for row in rows.values())
    assert all((row["first_token_seconds"] is not None) == prefill for row in rows.values())
    assert (tmp_path / "outputs" / "pretrained" / "bench.png").stat().st_size > 10_000
    assert max(len(line) for line in capsys.readouterr().out.splitlines()[:-1]) <= 80


def test_a_variant_that_fails_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Decoding.steps

    def failing(self: Decoding, count: int, weigh: bool = False) -> float:
        if self.variant.name == "absorbed":
            raise RuntimeError("no kernel for this")
        return steps(self, count, weigh)

    monkeypatch.setattr(Decoding, "steps", failing)
    write_model(tmp_path / "pretrained")
    with pytest.raises(StageError, match="some variants failed, as said above and in .*bench.json"):
        run.__wrapped__(composed([*overrides(tmp_path), *SIZES, *BENCH]))
    rows = json.loads((tmp_path / "outputs" / "pretrained" / "bench.json").read_text())["grid"][0]["variants"]
    assert (
        rows["absorbed"] == {"failed": "RuntimeError: no kernel for this"}
        and rows["expanded"]["speed_against_original"] > 0
    )
    shown = capsys.readouterr()
    assert "bench: absorbed: RuntimeError: no kernel for this" in shown.err and "RuntimeError" in shown.out
    assert (tmp_path / "outputs" / "pretrained" / "bench.png").stat().st_size > 10_000


def test_what_needs_a_gpu_is_refused_without_one(tmp_path: Path) -> None:
    write_model(tmp_path / "pretrained")
    for option in ("compile", "largest_batch"):
        config = composed([*overrides(tmp_path), *SIZES, *BENCH, f"bench.{option}=true"])
        with pytest.raises(ValueError, match=f"bench.{option}=true needs a GPU"):
            run.__wrapped__(config)


def test_a_peak_is_counted_from_when_it_was_reset() -> None:
    cpu = torch.device("cpu")
    torch.zeros(1 << 28, dtype=torch.uint8).fill_(1)  # a peak of before
    before = held_bytes(cpu)
    if not reset_peak(cpu):
        pytest.skip("this system cannot reset the peak of a process")
    assert peak_bytes(cpu) - before < 1 << 26
    torch.zeros(1 << 27, dtype=torch.uint8).fill_(1)
    grown = peak_bytes(cpu) - before
    assert grown > 1 << 26
    assert grown < 1 << 28
