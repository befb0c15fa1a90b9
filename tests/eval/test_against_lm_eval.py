"""The same rows through lm-eval's own runner: the same outputs and the same scores for all of LongBench's tasks.

Two differences are meant (eval/tasks.py): white space of six prompts, which lm-eval is handed here in LongBench's form,
and four tasks whose first line counts, where lm-eval stops at a newline even if nothing stands before it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.generate import CacheReading, Stops, generate
from eval.prompts import Prompter
from eval.tasks import longbench_tasks, rapidfuzz_for_fuzzywuzzy
from tests.eval.tiny import WINDOW, model, tokenizer

CLASSES = ["raise", "po", "of", "code", "is"]


def rows(name: str) -> list[dict[str, Any]]:
    """Four short rows; answers of common words, so that a model of random weights scores more than nothing."""
    asked = ["the", "a", "1", "of the"]
    kind = {
        "trec": "raise",
        "lsht": "raise",
        "passage_retrieval_en": "Paragraph 1",
        "passage_retrieval_zh": "段落1",
        "passage_count": "1",
    }
    return [
        {
            "input": f"question {number} of {word}",
            "context": f"some text {number} about {word} and more, Paragraph {number}",
            "answers": [kind[name]] if name in kind else [word, "the object is a value of 1 in the class"],
            "all_classes": CLASSES,
            "language": "en",
            "length": 9,
            "dataset": name,
            "_id": f"{name}-{number}",
        }
        for number, word in enumerate(asked)
    ]


@cache
def stock_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def theirs(name: str, folder: Path) -> list[dict[str, Any]]:
    """lm-eval's samples of its stock task on our rows, prompts aside."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    stock = stock_tasks()[f"longbench_{name}"]
    data = folder / f"{name}.jsonl"
    # lm-eval's copy of the data calls the column `input` `question`.
    data.write_text("".join(json.dumps(row | {"question": row["input"]}) + "\n" for row in rows(name)))
    settings = {
        "include": str(stock.yaml_path),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "doc_to_text": longbench_tasks()[name].prompt,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    harness = HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=1, max_length=WINDOW, add_bos_token=True)
    with rapidfuzz_for_fuzzywuzzy():
        found = simple_evaluate(harness, tasks=[f"local_{name}"], task_manager=manager, bootstrap_iters=0)
    return sorted(found["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])


def ours(name: str) -> list[tuple[str, float]]:
    task, words, network = longbench_tasks()[name], tokenizer(), model()
    newline = words("\n", add_special_tokens=False)["input_ids"][-1]
    stops = Stops([words.eos_token_id], words.pad_token_id, newline)
    prompter = Prompter(words, WINDOW)
    found = []
    for row in rows(name):
        ids = prompter.encode(task, row).ids
        [output] = generate(
            network, words, [ids], task.max_new_tokens, stops, CacheReading(), newline_ends=task.newline_ends
        )
        found.append((output, task.score(row, output)))
    return found


@pytest.mark.parametrize("name", list(longbench_tasks()))
def test_outputs_and_scores_are_lm_evals(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task, found = longbench_tasks()[name], ours(name)
    for (output, score), sample in zip(found, theirs(name, tmp_path), strict=True):
        [text] = sample["filtered_resps"]
        if not task.first_line:
            assert text == output
        elif text == "":
            # Theirs ended before a word; ours goes on to the first line that has some.
            assert output.startswith("\n")
            continue
        assert score == pytest.approx(sample["score"], abs=1e-9)
