"""The stages `evaluate` and `report` and the sweep's report, on tiny models from end to end."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import eval.score
import eval.variants
from conf.plan import Plan
from eval.evaluate import run_evaluate
from eval.report import PICTURE, run_report
from eval.sweep import main as sweep_main
from eval.sweep import sweep_report
from tests.eval.test_benchmarks import write_questions
from tests.eval.tiny import compose_config, finish_before_evaluation, write_original
from tests.eval.wandb_file import read_run

NAMES = ["passkey", "classification", "code_completion"]
REDUCTION = 1 - 10 / 32  # 4 + 6 numbers instead of 2 x 2 x 8


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Plan:
    """A whole run, evaluated and reported once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("run")
    write_original(folder)
    config = compose_config(folder, "tracking=wandb", "tracking.mode=offline")
    plan = finish_before_evaluation(config)
    run_evaluate(config)
    run_report(config, ["model=from_path", "mla.kv_lora_rank=6", "name=a b"])
    return plan


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def assert_narrow(said: str, *starts: str) -> None:
    """Lines with these starts were printed, in at most 80 columns."""
    lines = [line for line in said.splitlines() if line.startswith(starts)]
    assert len(lines) == len(starts) and max(map(len, lines)) <= 80, lines


def test_three_models_are_scored_on_the_same_inputs(run):
    scores = read(run.original.folder / "scores.json") | read(run.evaluate.folder / "scores.json")
    assert set(scores) == {"original", "converted", "healed"}
    for name in NAMES:
        assert len({scores[model]["tasks"][name]["inputs"] for model in scores}) == 1
        assert {scores[model]["tasks"][name]["rows"] for model in scores} == {2}
    assert len({scores[model]["perplexity"]["validation"]["inputs"] for model in scores}) == 1
    values = {scores[model]["perplexity"]["validation"]["value"] for model in scores}
    assert len(values) == 3 and all(1 < value < 1e9 for value in values)


def test_every_output_is_kept_with_its_score(run):
    for folder in (run.original.folder / "original", run.evaluate.folder / "converted", run.evaluate.folder / "healed"):
        for name in NAMES:
            rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            fields = {"_id", "prompt_tokens", "truncated", "answers", "output", "score"}
            fields |= {"depth", "share"} if name == "passkey" else set()
            assert [set(row) for row in rows] == [fields] * 2
            mean = 100 * sum(row["score"] for row in rows) / 2
            assert read(folder / f"{name}.json")["score"] == pytest.approx(mean)


def test_the_report_has_the_measured_reduction_the_drop_and_the_sentence(run):
    results, report = read(run.report.folder / "results.json"), (run.report.folder / "report.md").read_text()
    assert results["kv_cache_reduction"] == pytest.approx({"converted": REDUCTION, "healed": REDUCTION})
    assert results["cache"]["original"]["bytes_per_token_per_layer"] == 32 * 4
    assert results["cache"]["healed"]["bytes_per_token"] == 2 * 10 * 4
    for model in ("converted", "healed"):
        lost = results["score"]["original"] - results["score"][model]
        assert results["score_drop"][model]["points"] == pytest.approx(lost)
    sentence = report.split("\n\n")[1]
    assert "holds 40 bytes a token a layer instead of 128, measured: 68.75 % less" in sentence
    context = results["cache"]["original"]["mean_context"]
    assert f"less (float32 on cpu, against the original in 16 bits, mean context {context:,.0f} tokens)" in sentence
    assert results["machines"]["original"].startswith("cpu") and "different machines" not in report
    assert "after healing on 320 tokens" in sentence and sentence.count(".\n") == 0
    for text in (
        "## Tasks",
        "| passkey |",
        "## Conversion",
        "## Healing",
        "148.4",
        "pretrain_tokens",
    ):
        assert text in report, text
    assert "python -m train.pipeline model=from_path mla.kv_lora_rank=6 'name=a b'" in report
    assert results["config"]["eval"]["limit"] == 2 and results["provenance"]["versions"]["torch"]
    assert (run.report.folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert not list(run.report.folder.glob("*.tmp"))


def test_the_page_stands_alone(run):
    """Pictures are inside; tables are tables, the details' too; nothing is fetched from elsewhere."""
    text = (run.report.folder / "report.html").read_text()
    report = (run.report.folder / "report.md").read_text()
    assert text.startswith("<!doctype html>") and f"<title>{report.splitlines()[0][2:]}" in text
    assert text.count("data:image/png;base64,") == report.count("![") == 3
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)", text)
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert text.count("<table>") == len(re.findall(r"^\|-", report, re.MULTILINE)) >= 6
    assert not re.findall(r'(?:src|href)="(?!data:)', text)


def test_the_offline_wandb_run_holds_reduction_drop_and_table(run):
    results, kept = read(run.report.folder / "results.json"), read_run(run.report.folder)
    logged = {key: value for row in kept["history"] for key, value in row.items()}
    assert logged["kv_cache_reduction"] == pytest.approx(REDUCTION)
    assert logged["score_drop"] == pytest.approx(results["score_drop"]["healed"]["points"])
    perplexity = results["perplexity"]["validation"]["healed"]
    assert logged["perplexity/validation/healed"] == pytest.approx(perplexity)
    table = kept["tables"]["scores"]
    assert table["columns"] == ["task", "rows", "original", "converted", "healed", "drop_converted", "drop_healed"]
    assert [row[0] for row in table["data"]] == NAMES
    for row in table["data"]:
        assert row[2:5] == pytest.approx(
            [results["tasks"][row[0]]["score"][m] for m in ("original", "converted", "healed")]
        )
    for picture in ("reduction_vs_drop", "healing", "passkey"):
        assert (kept["files"] / logged[picture]["path"]).exists()
    assert "report" in kept["artifacts"]
    assert kept["config"]["eval"]["limit"] == 2


def test_finished_stages_are_not_run_again(run, capsys, monkeypatch):
    monkeypatch.setattr(eval.variants, "load_model", None)  # loading anything would fail
    run_evaluate(run.config)
    run_report(run.config)
    said = capsys.readouterr().out
    assert all(f"{stage}: finished in" in said for stage in ("original", "evaluate", "report"))


def test_output_reads_at_eighty_columns_and_without_colour(run, capsys):
    run.config.force = True
    try:
        run_report(run.config)
    finally:
        run.config.force = False
    said = capsys.readouterr().out
    assert_narrow(said, "model ", "original", "converted", "healed")
    assert not re.search(r"\x1b", said)


def test_an_evaluation_that_was_cut_off_goes_on_with_the_same_scores(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run.model_dir.parent.parent / "model", tmp_path / "model")
    config = compose_config(tmp_path, "eval.batch_size=1")
    plan = finish_before_evaluation(config)

    generate, calls = eval.score.generate, []

    def breaking(*args, **kwargs):
        calls.append(args)
        if len(calls) == 10:  # the original's three tasks of two rows, one of the converted's and half of another
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(eval.score, "generate", breaking)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(config)
    assert plan.original.record() and not plan.evaluate.record()
    kept = plan.evaluate.folder / "converted" / "passkey.jsonl"
    assert kept.exists() and not kept.with_name("classification.jsonl").exists()
    with kept.with_name("classification.part").open("a") as stream:
        stream.write('\n{"key": "cut o')
    with pytest.raises(FileNotFoundError, match="stage 'evaluate' .* has not finished"):
        run_report(config)
    written = kept.stat().st_mtime_ns
    capsys.readouterr()
    run_evaluate(config)
    said = capsys.readouterr().out  # no terminal: a line per score
    assert "converted: 3 scores are there already" in said and "converted: passkey" not in said
    assert len(re.findall(r"^healed: \w+ .*\[\d+ s, \d+ s left\]$", said, re.MULTILINE)) == 5
    assert len(calls) == 10 + 9  # a row of one task and two of another of the converted model, six of the healed
    assert not list(plan.evaluate.folder.rglob("*.part"))
    assert kept.stat().st_mtime_ns == written
    for name in ("original", "converted", "healed"):
        stage = "original" if name == "original" else "evaluate"
        theirs, ours = (getattr(each, stage).folder / name for each in (run, plan))
        for task in NAMES:
            assert (ours / f"{task}.jsonl").read_text() == (theirs / f"{task}.jsonl").read_text()


def test_a_score_of_other_inputs_or_another_version_is_computed_again(tmp_path):
    file = tmp_path / "passkey.json"
    file.write_text(json.dumps({"inputs": "a", "version": "1"}))
    assert eval.score.is_done(file, "a", "1")
    assert not eval.score.is_done(file, "a", "2") and not eval.score.is_done(file, "b", "1")
    assert not eval.score.is_done(tmp_path / "other.json", "a", "1")
    on = {"dtype": "float32", "device": "cpu"}
    assert not eval.score.is_done(file, "a", "1", on)  # of a version that did not say
    file.write_text(json.dumps({"inputs": "a", "version": "1"} | on))
    assert eval.score.is_done(file, "a", "1", on)
    assert not eval.score.is_done(file, "a", "1", on | {"dtype": "bfloat16"})
    assert not eval.score.is_done(file, "a", "1", on | {"device": "cuda"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.max_length=5000", "larger than the model's window of 1024"),
        ("eval.perplexity_text=/nowhere.txt", "/nowhere.txt"),
        ("launch.device=cuda", "sees no CUDA device"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_a_model_is_loaded(run, tmp_path, monkeypatch, override, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(eval.variants, "load_model", None)
    shutil.copytree(run.model_dir.parent.parent / "model", tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config = compose_config(tmp_path, override)
        plan = finish_before_evaluation(config)
        run_evaluate(config)
    if "plan" in locals():
        assert not plan.original.folder.exists()


def test_a_run_that_has_not_finished_is_refused(run, tmp_path):
    shutil.copytree(run.model_dir.parent.parent / "model", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="make sample"):
        run_evaluate(compose_config(tmp_path))


def test_long_prompts_are_cut_and_counted(run, tmp_path):
    shutil.copytree(run.model_dir.parent.parent / "model", tmp_path / "model")
    rows = [
        {"input": "Q", "context": "word " * size, "answers": ["A"], "all_classes": None, "_id": str(size)}
        for size in (10, 900)
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "hotpotqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    local = ["eval.source=local", f"eval.data_dir={tmp_path / 'rows'}", "eval.tasks=[]"]
    config = compose_config(tmp_path, *local)
    plan = finish_before_evaluation(config)
    run_evaluate(config)
    run_report(config)
    task = read(plan.report.folder / "results.json")["tasks"]["hotpotqa"]
    assert (task["rows"], task["truncated"]) == (2, 1)
    assert "| hotpotqa | 5+1 | 2 | 1 |" in (plan.report.folder / "report.md").read_text()


def test_a_sweep_ends_in_one_table_and_one_picture_with_its_failures(run, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    other = tmp_path / "other" / "report"  # a second point: the same run at a higher reduction
    shutil.copytree(run.report.folder, other, ignore=shutil.ignore_patterns("wandb"))
    results = read(other / "results.json")
    results |= {"point": "smaller", "kv_cache_reduction": {"converted": 0.9, "healed": 0.9}}
    results["score_drop"]["healed"] = {"points": None, "percent": None}  # missing stays missing
    (other / "results.json").write_text(json.dumps(results))
    points = [
        {"status": "finished", "overrides": ["mla.kv_lora_rank=3"], "run_dir": str(other.parent)},
        {"status": "failed", "overrides": ["mla.kv_lora_rank=999"], "error": "r is larger than full rank"},
        {"status": "finished", "overrides": ["mla.kv_lora_rank=6"], "run_dir": str(run.run_dir)},
        {"status": "unfinished", "overrides": ["mla.kv_lora_rank=5"]},
    ]
    for number, point in enumerate(points):
        (sweep / str(number)).mkdir(parents=True)
        (sweep / str(number) / "point.json").write_text(json.dumps(point))
    assert sweep_main([str(sweep)]) == 0
    found = read(sweep / "sweep.json")
    assert [point["kv_cache_reduction"] for point in found["points"]] == pytest.approx([REDUCTION, 0.9])
    assert "score_drop" in found["points"][0] and "score_drop" not in found["points"][1]
    assert found["failed"]["mla.kv_lora_rank=999"] == "r is larger than full rank" and len(found["failed"]) == 2
    report = (sweep / "sweep.md").read_text()
    assert "smaller" in report and "r is larger than full rank" in report
    assert (sweep / PICTURE).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert_narrow(said, "point ", "original", run.config.name, "smaller", "failed: mla.kv_lora_rank=999")
    kept = read_run(sweep)
    assert [row[0] for row in kept["tables"]["points"]["data"]] == [run.config.name, "smaller"]
    assert "report" in kept["artifacts"]


def test_points_of_a_sweep_that_do_not_compare_are_told_and_left_out(run, tmp_path):
    first = read(run.report.folder / "results.json")
    points = {}
    for name, change in (
        ("same", {}),
        ("other-dtype", {"dtype": "bfloat16"}),
        ("other-rows", {"tasks": first["tasks"] | {"passkey": first["tasks"]["passkey"] | {"inputs": "x"}}}),
        ("fewer-tasks", {"tasks": {"passkey": first["tasks"]["passkey"]}}),
        ("other-text", {"perplexity_tokens": {"validation": 7}}),
        ("other-model", {"model": "another", "tasks": {}, "device": "cuda"}),
    ):
        points[name] = tmp_path / name
        (tmp_path / name / "report").mkdir(parents=True)
        (tmp_path / name / "report" / "results.json").write_text(json.dumps(first | {"point": name} | change))
    sweep = sweep_report([run.run_dir, *points.values()], tmp_path / "out", {})
    assert [point["point"] for point in sweep["points"]] == [first["point"], "other-model", "same"]
    assert {point["dtype"] for point in sweep["points"]} == {"float32"}
    assert sweep["failed"]["other-dtype"] == "scored in bfloat16, the others in float32; give eval.dtype"
    for name, rows in (("other-rows", "passkey"), ("fewer-tasks", "classification"), ("other-text", "perplexity")):
        told = sweep["failed"][name]
        assert f"scored on other rows than '{first['point']}'" in told and rows in told
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert text.count("| original model |") == text.count("| original another |") == 1  # each model has its own
    assert "float32 on cpu, cuda, against the original in 16 bits, mean context " in text


def test_scores_that_were_kept_from_a_machine_of_another_dtype_are_refused_before_scoring(run, tmp_path, monkeypatch):
    folder = Path(run.config.output_dir).parent
    config = compose_config(folder, "name=elsewhere")
    finish_before_evaluation(config)
    monkeypatch.setattr("eval.inputs.torch_dtype", lambda wanted, on_cpu, stored=None: torch.bfloat16)
    monkeypatch.setattr(eval.variants, "load_model", None)  # loading anything would fail
    with pytest.raises(ValueError, match=r"original model in float32, but eval.dtype=auto is bfloat16 on this machine"):
        run_evaluate(config)


def test_a_sweep_without_a_finished_point_fails_and_says_why(tmp_path, capsys):
    (tmp_path / "lost").mkdir()
    assert sweep_main([str(tmp_path / "lost"), "--output", str(tmp_path / "out")]) == 1
    assert "no report was made" in (tmp_path / "out" / "sweep.md").read_text()
    assert sweep_main([str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert sweep_report([], tmp_path / "out", {"a": "b"})["failed"] == {"a": "b"}


def test_the_healed_model_is_scored_with_its_cache_in_few_bits_too(run, tmp_path, capsys):
    folder = Path(run.config.output_dir).parent
    words = ["eval.cache_bits=[8,4]", "name=default"]
    plan = Plan(compose_config(folder, *words))
    finish_before_evaluation(plan.config)
    before = (run.original.folder / "stage.json").read_text()
    run_evaluate(plan.config)
    assert (run.original.folder / "stage.json").read_text() == before  # the original has no latent
    run_report(plan.config)
    results = read(plan.report.folder / "results.json")
    assert list(results["score"]) == ["original", "converted", "healed", "healed-8bit", "healed-4bit"]
    cuts = [results["kv_cache_reduction"][model] for model in ("healed", "healed-8bit", "healed-4bit")]
    assert cuts[0] == pytest.approx(REDUCTION)
    # Ranges of 6 + 4 numbers take nearly as much as they: in 16 bits, as reductions count, 8 bits win nothing.
    assert cuts[1] < cuts[2] < cuts[0]
    held = [results["cache"][model]["bytes_per_token"] for model in ("healed", "healed-8bit", "healed-4bit")]
    assert held == sorted(held, reverse=True)
    for text in ("validation", "code"):  # through the cache, which keeps windows so short as they are
        for figure in ("perplexity", "kl_divergence"):
            assert results[figure][text]["healed-4bit"] == pytest.approx(results[figure][text]["healed"], rel=1e-3)
        assert results["kl_divergence"][text]["original"] is None
    report = (plan.report.folder / "report.md").read_text()
    assert report.count("healed-4bit") >= 3  # summary, tasks, cache
    assert_narrow(capsys.readouterr().out, "healed-8bit  ", "healed-4bit  ")
    outputs = {
        model: [json.loads(line)["output"] for line in (plan.evaluate.folder / model / "passkey.jsonl").open()]
        for model in ("healed", "healed-8bit")
    }
    assert all(outputs["healed-8bit"])


def test_bits_that_a_latent_cannot_take_are_refused_before_scoring(run):
    folder = Path(run.config.output_dir).parent
    with pytest.raises(ValueError, match="2, 3, 4 or 8 bits"):
        compose_config(folder, "eval.cache_bits=[5]")
    config = compose_config(folder, "eval.cache_bits=[2]")
    with pytest.raises(ValueError, match="6 channels of 2 bits do not fill bytes"):
        run_evaluate(config)


def test_benchmarks_stand_beside_the_tasks(tmp_path):
    write_original(tmp_path)
    write_questions(tmp_path / "questions", ["A", "B", "C", "D"])
    words = ["eval.tasks=[passkey]", "eval.benchmarks=[OpenBookQA]", f"eval.benchmark_data={tmp_path / 'questions'}"]
    config = compose_config(tmp_path, *words, "eval.benchmark_limit=3", "eval.cache_bits=[8]")
    plan = finish_before_evaluation(config)
    run_evaluate(config)
    run_report(config)
    found = read(plan.report.folder / "results.json")["benchmarks"]
    assert set(found) == {"OpenBookQA", "average"}
    assert found["OpenBookQA"]["original"]["questions"] == found["OpenBookQA"]["healed-8bit"]["questions"] == 3
    assert found["average"]["healed"]["score"] == found["OpenBookQA"]["healed"]["score"]
    assert (
        "## Benchmarks\n\n|  | questions | original | converted | healed | healed-8bit |"
        in (plan.report.folder / "report.md").read_text()
    )
    (tmp_path / "questions" / "openbookqa").rename(tmp_path / "questions" / "elsewhere")
    with pytest.raises(ValueError, match="holds no openbookqa/main"):
        run_evaluate(compose_config(tmp_path, *words, "force=true"))
