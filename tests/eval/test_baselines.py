"""The quantised original beside the converted model: scored through its cache, once for all points, in every table."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

import eval.baselines
import eval.variants
from conf.evaluation import baseline_bits
from conf.plan import Plan
from eval.evaluate import run_evaluate
from eval.frontier_picture import FRONTIER
from eval.generate import growing_cache
from eval.harness import Harness
from eval.report import PICTURE, run_report
from eval.sweep import main as sweep_main
from eval.sweep import sweep_report
from mha2mla import ConversionOptions, convert
from tests.eval.few_bits import few_bits
from tests.eval.test_benchmarks import write_tiny
from tests.eval.test_evaluate import assert_narrow, read
from tests.eval.tiny import compose_config, finish_before_evaluation, model, write_original
from tests.eval.wandb_file import read_run

CALIBRATION = ("calibration.tokens=128", "calibration.sequence_length=64")
WORDS = ("eval.baselines=[kivi-4,kivi-2,transform-1.5]", "eval.tasks=[passkey]", *CALIBRATION)


def cut_by_rank(original: Any, tokenizer: Any, bits: float, batches: Any) -> Any:
    """In place of the coder: the same interface, its bits made of ranks."""
    assert sum(batch.numel() for batch in batches) >= 128
    return convert(original, ConversionOptions(rope_dim=4, kv_lora_rank=round(16 * bits)))[0].eval()


@pytest.fixture(scope="module")
def stand_ins() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval.baselines, "kivi_cache", few_bits)
        patch.setattr(eval.baselines, "transform_coder", cut_by_rank)
        yield patch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stand_ins: Any) -> Plan:
    folder = tmp_path_factory.mktemp("baselines")
    write_original(folder)
    config = compose_config(folder, *WORDS, "tracking=wandb", "tracking.mode=offline", "eval.cache_bits=[8]")
    plan = finish_before_evaluation(config)
    run_evaluate(config)
    run_report(config)
    return plan


def test_baselines_are_scored_through_their_caches(run: Plan) -> None:
    results = read(run.report.folder / "results.json")
    names = ["original", "kivi-4", "kivi-2", "transform-1.5", "converted", "healed", "healed-8bit"]
    assert list(results["score"]) == names and results["baselines"] == names[1:4]
    cuts = results["kv_cache_reduction"]
    assert 0.5 < cuts["kivi-4"] < cuts["kivi-2"] < 0.9  # bytes as they are packed
    assert cuts["transform-1.5"] == pytest.approx(1 - 28 / 32)  # the stand-in's 4 + 24 numbers of 32
    for text in ("validation", "code"):
        distances, perplexities = results["kl_divergence"][text], results["perplexity"][text]
        assert distances["original"] is None and results["top1_agreement"][text]["original"] is None
        assert 0 < distances["kivi-4"] < distances["kivi-2"]  # a control: other bits, other numbers
        assert len(set(perplexities.values())) == len(names)
        assert all(0 <= results["top1_agreement"][text][name] <= 1 for name in names[1:])


def test_every_table_the_picture_and_wandb_have_them(run: Plan) -> None:
    report = (run.report.folder / "report.md").read_text()
    tables = {part.split("\n")[0]: part for part in report.split("\n## ")}
    for title in ("Summary", "Distance to the original", "Tasks", "Cache, as measured"):
        assert all(name in tables[title] for name in ("kivi-4", "kivi-2", "transform-1.5", "healed-8bit")), title
    sentence = report.split("\n\n")[2]
    assert "the healed model is **" in sentence and "the quantised original" in sentence
    results = read(run.report.folder / "results.json")
    assert set(results["equal_bytes"]) == {"kl_divergence", "perplexity"}
    assert results["machines"]["kivi-4"].startswith("cpu") and "baselines/kivi-2" in results["stages"]
    logged = {key: value for row in read_run(run.report.folder)["history"] for key, value in row.items()}
    for name in ("kivi-2", "transform-1.5", "healed"):
        assert logged[f"kl/validation/{name}"] == pytest.approx(results["kl_divergence"]["validation"][name])
        assert logged[f"cache_bytes_per_token/{name}"] > 0 and logged[f"perplexity/code/{name}"] > 1
    assert "kl/validation/original" not in logged
    assert (run.report.folder / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_another_point_or_another_baseline_keeps_the_scores(run: Plan, capsys: Any, monkeypatch: Any) -> None:
    folder = Path(run.config.output_dir).parent
    kept = {name: (stage.folder / "stage.json").read_text() for name, stage in run.baselines.items()}
    more = [word.replace("kivi-2", "kivi-2,transform-1") for word in (*WORDS, "name=other")]
    config = compose_config(folder, *more)
    plan = finish_before_evaluation(config)
    assert plan.baselines["kivi-2"].record() and not plan.baselines["transform-1"].record()
    run_evaluate(config)
    said = capsys.readouterr().out
    assert "transform-1: loading" in said and "healed: loading" in said
    assert not any(f"{name}: loading" in said for name in ("original", "kivi-4", "kivi-2", "transform-1.5"))
    assert kept == {name: (stage.folder / "stage.json").read_text() for name, stage in run.baselines.items()}
    # Other calibration text is another transform, and nothing to the others.
    changed = Plan(compose_config(folder, *more, "calibration.tokens=256"))
    assert changed.baselines["kivi-4"].record() and not changed.baselines["transform-1"].record()
    monkeypatch.setattr(eval.variants, "load_model", None)  # loading anything would fail
    run_evaluate(config)
    assert "baselines/transform-1: finished in" in capsys.readouterr().out


def test_a_sweep_draws_one_frontier_and_reads_reports_of_earlier_versions(
    run: Plan, tmp_path: Path, capsys: Any
) -> None:
    results = read(run.report.folder / "results.json")
    without = ("kl_divergence", "top1_agreement", "baselines", "equal_bytes")
    old = {name: value for name, value in results.items() if name not in without} | {"point": "old"}
    for key in ("perplexity", "perplexity_tokens"):
        old[key] = {"validation": results[key]["validation"]}
    for figures in (old["score"], old["kv_cache_reduction"], old["cache"], old["perplexity"]["validation"]):
        for name in results["baselines"]:
            figures.pop(name, None)
    (tmp_path / "old" / "report").mkdir(parents=True)
    (tmp_path / "old" / "report" / "results.json").write_text(json.dumps(old))
    assert sweep_main([str(run.run_dir), str(tmp_path / "old"), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert_narrow(said, "point ", "original", "kivi-4", "kivi-2", "transform-1.5", run.config.name, "old")
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert f"{results['kl_divergence']['validation']['healed']:.3f}" in rows[str(run.config.name)]
    assert rows["old"].split()[-2] == "–"  # missing stays missing
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert FRONTIER in text and "the quantised original" in text
    assert (tmp_path / "out" / FRONTIER).read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "out" / "wandb", ignore_errors=True)
    assert not sweep_report([tmp_path / "old"], tmp_path / "alone", {})["failed"]
    assert "the quantised original" not in (tmp_path / "alone" / "sweep.md").read_text()


@pytest.mark.parametrize("name", ["kivi-5", "kivi", "transform-0.4", "transform-9", "transform-x", "none", "kivi-4.0"])
def test_names_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"no baseline .*there are kivi-4, kivi-3, kivi-2, and transform-B"):
        compose_config(tmp_path, f"eval.baselines=[{name}]")
    assert baseline_bits("kivi-3") == ("kivi", 3) and baseline_bits("transform-1.5") == ("transform", 1.5)


def likelihoods(folder: Path, tokenizer: Any, new_cache: Any, batch_size: int) -> list[float]:
    harness = Harness(eval.variants.load_model(folder, torch.float32), tokenizer, batch_size, new_cache)
    pairs = [("w3 w9 w12", " w5 w6"), ("w11 w2", " w1"), ("w17", " w22 w3 w8 w2 w9"), ("w40 w41", " w43 w44 w45")]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    return [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]


def test_benchmarks_go_through_a_fresh_cache_without_padding(tmp_path: Path) -> None:
    from conf.pretrained import load_tokenizer

    write_tiny(tmp_path)
    tokenizer, made = load_tokenizer(tmp_path), []

    def fresh(each: Any) -> Any:
        made.append(few_bits(2)(each))
        return made[-1]

    plain = likelihoods(tmp_path, tokenizer, None, 4)
    assert likelihoods(tmp_path, tokenizer, growing_cache, 4) == pytest.approx(plain, rel=1e-5)
    few = likelihoods(tmp_path, tokenizer, fresh, 4)
    assert len(made) >= 3 and all(cache.get_seq_length() < 8 for cache in made)
    assert few == pytest.approx(likelihoods(tmp_path, tokenizer, few_bits(2), 1), rel=1e-4)  # as each alone
    assert max(abs(a - b) for a, b in zip(plain, few, strict=True)) > 1e-3  # a control


def test_a_kivi_cache_that_the_model_cannot_have_is_refused_before_scoring(run: Plan, monkeypatch: Any) -> None:
    def refusing(bits: int) -> Any:
        def new_cache(each: Any) -> Any:
            raise ValueError(f"head_dim={each.config.head_dim} takes no {bits} bits")

        return new_cache

    monkeypatch.setattr(eval.baselines, "kivi_cache", refusing)
    folder = Path(run.config.output_dir).parent
    config = compose_config(folder, *WORDS, "eval.limit=1", "name=refused")
    finish_before_evaluation(config)
    with pytest.raises(ValueError, match="head_dim=8 takes no 4 bits"):
        run_evaluate(config)
    assert model().config.head_dim == 8
