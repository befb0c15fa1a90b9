"""The bench of decoding: every variant against the original, and a cache of the size that was asked for."""

import json
from pathlib import Path

from eval.bench import run
from tests.train.tiny import composed, overrides, write_model


def test_every_variant_against_the_original(tmp_path: Path, capsys) -> None:
    write_model(tmp_path / "pretrained")
    sizes = ["mla.rope_dim=8", "mla.kv_lora_rank=10", "launch.device=cpu"]
    bench = ["bench.context=300", "bench.batch_size=2", "bench.steps=2", "bench.rounds=2", "bench.dtype=float32"]
    run.__wrapped__(composed([*overrides(tmp_path), *sizes, *bench]))
    result = json.loads((tmp_path / "outputs" / "pretrained" / "bench.json").read_text())
    rows = result["variants"]
    assert list(rows) == ["original", "expanded", "absorbed", "absorbed, 4 bits"]
    assert rows["original"]["speed_against_original"] == 1
    # 18 numbers of the 32 that two heads of eight keys and values hold.
    assert rows["absorbed"]["cache_against_original"] == rows["expanded"]["cache_against_original"] == 18 / 32
    # Nearly all tokens are coded: 5 bytes and two halves of the latent, 8 and two halves of the rotated key, of 32 x 4.
    assert 21 / 128 < rows["absorbed, 4 bits"]["cache_against_original"] < 0.5
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert max(len(line) for line in capsys.readouterr().out.splitlines()[:-1]) <= 80
