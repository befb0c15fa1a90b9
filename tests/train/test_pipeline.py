"""The whole pipeline on a tiny model: one command to a healed model and a report, skipped when done, and a sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import mha2mla  # noqa: F401  registers the converted classes
from eval.text import passages
from tests.eval.tiny import tokenizer, write_original
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return command_line(tmp_path_factory.mktemp("pipeline"))


def command_line(root: Path, original: PreTrainedModel | None = None) -> list[str]:
    """Command line of a run that takes seconds: a random model, a small local corpus, a few steps."""
    write_original(root, original)
    lines = [json.dumps({"text": text}) for text in passages()[:400]]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    return [
        "model=from_path",
        f"model.path={root / 'model'}",
        f"output_dir={root / 'outputs'}",
        "data=local",
        f"data.files=[{root / 'corpus.jsonl'}]",
        "data.tokens=4096",
        "data.validation_tokens=1024",
        "data.sequence_length=64",
        "calibration.tokens=512",
        "calibration.sequence_length=64",
        "mla.rope_dim=4",
        "mla.reconstruction_steps=3",
        "finetune.global_batch_size=4",
        "finetune.max_steps=6",
        "finetune.log_every=2",
        "eval.tasks=[passkey]",
        "eval.limit=2",
        "eval.max_length=300",
        "eval.perplexity_tokens=256",
        "eval.perplexity_sequence_length=32",
        "eval.divergence_tokens=64",
        "launch.device=cpu",
    ]


# A key for a W&B server that is out of reach, which must not cost the run.
AWAY = {
    "WANDB_MODE": "online",
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_API_KEY": "a" * 40,
    "WANDB_INIT_TIMEOUT": "1",
}


def pipeline(*arguments: str, wandb: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    wandb = {"WANDB_MODE": "offline"} if wandb is None else wandb
    environment = os.environ | wandb | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train.pipeline", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_one_command_to_a_healed_model_and_a_report(words: list[str]) -> None:
    run = pipeline(*words, "mla.kv_lora_rank=8", "name=point", wandb=AWAY)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    folder = Path(words[2].split("=")[1]) / "model" / "point"
    for stage in ("finetune", "report"):
        assert run.stdout.count(f"{stage}: W&B failed") == 1, run.stdout
        assert list((folder / stage / "wandb").glob("offline-run-*"))
    results = json.loads((folder / "report" / "results.json").read_text())
    assert (folder / "report" / "report.md").stat().st_size > 500
    assert (folder / "report" / "reduction_vs_drop.png").stat().st_size > 5000
    # Asked for are 87.5 % of 4,096 tokens' bytes; of short texts the first tokens, which stay unquantised, weigh more.
    assert 0.8 < results["kv_cache_reduction"]["healed"] < 0.9
    assert results["kl_divergence"] and AutoConfig.from_pretrained(folder / "finetune").cache_format
    assert results["model"] == "model"
    healed = AutoModelForCausalLM.from_pretrained(folder / "finetune")
    converted = AutoModelForCausalLM.from_pretrained(folder / "convert")
    assert not torch.equal(
        healed.model.layers[0].self_attn.o_proj.weight, converted.model.layers[0].self_attn.o_proj.weight
    )
    assert AutoTokenizer.from_pretrained(folder / "finetune").eos_token == "</s>"

    again = pipeline(*words, "mla.kv_lora_rank=8", "name=point")
    assert again.returncode == 0
    assert again.stdout.count("skipped") == 6 and "== " not in again.stdout

    changed = pipeline(*words, "mla.kv_lora_rank=8", "name=point", "finetune.learning_rate=-1")
    assert changed.returncode == 1
    assert changed.stderr.strip() == "error: finetune.learning_rate=-1.0 must be positive"


@pytest.mark.parametrize(("family", "streamed"), [("gpt_neox", "off"), ("qwen3_moe", "on")])
def test_other_families_go_all_the_way(family: str, streamed: str, tmp_path: Path) -> None:
    """Converted in memory or layer by layer, healed by distillation with hidden states, scored with a coded cache."""
    original = tiny_model(family, vocab_size=len(tokenizer()), max_position_embeddings=512)
    words = command_line(tmp_path, original)
    changes = ["method=best", "mla.bits=16", "mla.reconstruction_steps=3", "finetune.loss=kd+hidden"]
    changes.append(f"launch.streamed={streamed}")
    run = pipeline(*words, *changes, "mla.kv_lora_rank=8", "mla.reduction=null", "eval.cache_bits=[8]", "name=point")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads((tmp_path / "outputs" / "model" / "point" / "report" / "results.json").read_text())
    assert ("layer by layer" in run.stdout) == (streamed == "on")
    assert set(results["score"]) == {"original", "converted", "healed", "healed-8bit"}


def test_a_sweep_survives_a_failing_point_and_reports_all(words: list[str]) -> None:
    """Three ranks, each healed by two processes, and one that cannot be."""
    two = ["launch.num_processes=2", "finetune.micro_batch_size=2"]
    run = pipeline("--multirun", "mla.bits=16", "mla.kv_lora_rank=6,999,10,8", *words, *two)
    assert run.returncode == 1
    assert "kv_lora_rank=999" in run.stderr and "full rank is 28" in run.stderr
    [folder] = (Path(words[2].split("=")[1]) / "sweeps").iterdir()
    points = [json.loads(file.read_text()) for file in sorted(folder.glob("*/point.json"))]
    assert [point["status"] for point in points] == ["finished", "failed", "finished", "finished"]
    trained = [json.loads((ROOT / point["run_dir"] / "finetune" / "stage.json").read_text()) for point in points[::2]]
    assert [record["metrics"]["processes"] for record in trained] == [2, 2]
    table = (folder / "sweep.md").read_text()
    assert "mla.kv_lora_rank=999" in table or "r999" in table
    assert f"{100 * (1 - 10 / 32):.2f}" in table and f"{100 * (1 - 14 / 32):.2f}" in table
    assert list(folder.glob("*.png"))
    # The sample and the original's scores were made once for both points.
    assert run.stdout.count("== sample ==") <= 1 and run.stdout.count("== original ==") <= 1
