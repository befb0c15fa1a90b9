"""Damaged files of LongBench's rows: they score, or are refused in one line that names the file (tests/fuzz.py)."""

import json

import pytest

from conf.evaluation import LONGBENCH_V2, EvalConfig, TaskSource
from eval.sources import load_rows
from tests.fuzz import json_mutations, mutations, refusal

ROW = {"_id": "1", "input": "Where?", "context": "A long text, é.", "length": 3, "dataset": "d", "language": "en"}
TASKS = {
    "hotpotqa": ROW | {"answers": ["Paris", "in Paris"], "all_classes": None},
    "trec": ROW | {"answers": ["City"], "all_classes": ["City", "Color"]},
    "passage_retrieval_en": ROW | {"answers": ["Paragraph 3"], "all_classes": None},
    "passage_count": ROW | {"answers": ["3"], "all_classes": None},
    LONGBENCH_V2: {"_id": "1", "question": "Which?", "answer": "C", "context": "A long text."}
    | {f"choice_{letter}": f"choice {letter}" for letter in "ABCD"},
}
COUNT = 60  # damaged copies of each file


def read_and_score(folder, name):
    config = EvalConfig(source=TaskSource.local, data_dir=str(folder), tasks=[name])
    [(task, rows)] = load_rows(config, lambda task, text: True)
    for row in rows:
        assert (task.render(row) + row["_id"]).encode()
        assert 0 <= task.score(row, "Paragraph 3 says: Paris, a City. The correct answer is (C)") <= 1


def written(name, rows):
    """In the form that the task's files have: lines for the first LongBench, an array for the second."""
    if name == LONGBENCH_V2:
        return f"{name}.json", json.dumps(rows)
    rows = rows if isinstance(rows, list) else [rows]
    return f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", TASKS)
def test_damaged_rows(tmp_path, name, fuzz):
    rows = [TASKS[name], TASKS[name] | {"_id": "2"}]
    file, text = written(name, rows)
    (tmp_path / file).write_text(text)
    read_and_score(tmp_path, name)
    damaged = [*mutations(text.encode(), 0, COUNT * fuzz)]
    damaged += [written(name, each)[1].encode() for each in json_mutations(rows, 0, 2 * COUNT * fuzz)]
    refused = 0
    for each in damaged:
        (tmp_path / file).write_bytes(each)
        refused += refusal(lambda: read_and_score(tmp_path, name), file) is not None
    assert 0 < refused < len(damaged), "damage that is always or never noticed is no test"
