"""`launch.streamed`: the stage goes on after SIGKILL, within memory, and ends in the checkpoint it would have been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mha2mla  # noqa: F401  registers the converted classes
from eval.text import passages
from tests.eval.tiny import tokenizer
from tests.random_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
GIB = 2**30


def command(root: Path, output: str, *changes: str) -> list[str]:
    words = [
        "model=from_path",
        f"model.path={root / 'model'}",
        f"output_dir={root / output}",
        "method=best",
        "data=local",
        "data.tokens=4096",
        f"data.files=[{root / 'corpus.jsonl'}]",
        "calibration.sequence_length=64",
        "calibration.tokens=512",
        "launch.device=cpu",
        "launch.streamed=on",
        "mla.bits=16",
        "name=point",
        *changes,
    ]
    return [sys.executable, "-m", "train.convert", *words]


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_after(process: subprocess.Popen, folder: Path, layers: int) -> int:
    """SIGKILL when so many layers are done; returns how many were noted as done then."""
    progress = folder / "unfinished" / "progress.json"
    while process.poll() is None:
        if progress.exists() and (done := json.loads(progress.read_text())["layers"]) >= layers:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return done
        time.sleep(0.02)
    raise AssertionError(f"it ended before it was killed: {process.stdout.read()[-2000:]}")


def write_corpus(root: Path) -> None:
    lines = [json.dumps({"text": text}) for text in passages()[:400]]
    (root / "corpus.jsonl").write_text("\n".join(lines))


def test_a_killed_stage_goes_on_to_the_same_checkpoint(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_checkpoint(tmp_path / "model", str(tmp_path / "tokenizer"), layers=10, hidden=512)
    whole = start(command(tmp_path, "whole"))
    assert whole.wait() == 0, whole.stdout.read()[-2000:]
    folder = tmp_path / "out" / "model" / "point" / "convert"
    killed = kill_after(start(command(tmp_path, "out")), folder, 3)
    assert 3 <= killed < 10 and not (folder / "config.json").exists() and not (folder / "stage.json").exists()
    again = start(command(tmp_path, "out"))
    assert again.wait() == 0, again.stdout.read()[-2000:]
    states = [
        AutoModelForCausalLM.from_pretrained(tmp_path / out / "model" / "point" / "convert").state_dict()
        for out in ("whole", "out")
    ]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    found = [
        json.loads((tmp_path / out / "model/point/convert/conversion.json").read_text()) for out in ("whole", "out")
    ]
    assert found[0] == found[1] and len(found[0]["reconstruction"]) == 10


@pytest.mark.slow
def test_twelve_gigabytes_convert_within_four_gibibytes(tmp_path: Path) -> None:
    """Anonymous memory, all but the page cache, of a conversion that is killed once on its way."""
    write_corpus(tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    size = write_checkpoint(tmp_path / "model", str(tmp_path / "tokenizer"), layers=28, hidden=4096)
    assert size > 12e9
    words = command(tmp_path, "out", "mla.reconstruction_steps=0", "calibration.tokens=1024")
    folder = tmp_path / "out" / "model" / "point" / "convert"
    assert kill_after(start(words), folder, 2) < 28
    again, peak = start(words), 0
    while again.poll() is None:
        peak = max(peak, anonymous_bytes(again.pid))
        time.sleep(0.1)
    assert again.returncode == 0, again.stdout.read()[-2000:]
    record = json.loads((folder / "stage.json").read_text())
    print(f"{size / 1e9:.1f} GB: peak {peak / GIB:.2f} GiB, {record['seconds']:.0f} s after the kill")
    if results := os.environ.get("RESULTS"):  # docs/results, for docs/scaling.md
        keep(Path(results) / "streamed.json", tmp_path / "model", size, peak, record)
    assert peak < 4 * GIB


def keep(file: Path, model: Path, size: int, peak: int, record: dict) -> None:
    """What docs/scaling.md shows of this run."""
    config = json.loads((model / "config.json").read_text())
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    shape = {name: config[name] for name in [*names.split(), "tie_word_embeddings"]}
    found = {"shape": shape, "bytes": size, "peak_gib": peak / GIB, "seconds": record["seconds"]}
    found |= {"calibration_tokens": 1024, "length": 64, "layers_after_the_kill": config["num_hidden_layers"] - 2}
    file.write_text(json.dumps(found | {"provenance": record["provenance"]}, indent=1) + "\n")


def anonymous_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
