"""Rows from folders, zip files and a hub that cannot be reached."""

import json
import zipfile

import pytest

from conf.evaluation import EvalConfig, TaskSource
from eval.sources import load_rows, zip_rows

ROW = {
    "input": "Q",
    "context": "C",
    "answers": ["A"],
    "length": 1,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "x",
}


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")


def load(folder, **options):
    return load_rows(EvalConfig(source=TaskSource.local, data_dir=str(folder), **options), lambda task, text: True)


def test_a_folder_gives_the_tasks_it_has(tmp_path):
    write(tmp_path, "qasper", [ROW, ROW | {"_id": "y"}, ROW | {"_id": "z"}])
    write(tmp_path, "trec", [ROW | {"all_classes": ["A", "B"]}])
    write(tmp_path, "notes", [{"anything": 1}])
    loaded = load(tmp_path, limit=2)
    assert [(task.name, [row["_id"] for row in rows]) for task, rows in loaded] == [
        ("qasper", ["x", "y"]),
        ("trec", ["x"]),
    ]
    assert [task.name for task, _ in load(tmp_path, tasks=["trec"])] == ["trec"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"input": "Q", "context": "C", "_id": "1"}',
            r"qasper.jsonl:1 lacks the columns answers, all_classes.*this one has",
        ),
        (json.dumps(ROW) + "\n{broken", r"qasper.jsonl:2 is not JSON"),
        ("\n", r"holds no rows"),
    ],
)
def test_a_file_of_another_form_is_named_with_the_place(tmp_path, content, message):
    (tmp_path / "qasper.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no file that is named after a LongBench task"):
        load(tmp_path)
    write(tmp_path, "qasper", [ROW])
    with pytest.raises(ValueError, match=r"trec.jsonl not found; it has qasper"):
        load(tmp_path, tasks=["trec", "qasper"])


def test_rows_come_out_of_longbenchs_zip_file(tmp_path):
    file = tmp_path / "data.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(ROW | {"context": "a\u2028b"}, ensure_ascii=False))
        archive.writestr("__MACOSX/data/._qasper.jsonl", "rubbish")
    [(name, rows)] = zip_rows(file, ["qasper"])
    assert name == "qasper" and rows[0]["context"] == "a\u2028b"
    with pytest.raises(ValueError, match="holds no trec.jsonl"):
        zip_rows(file, ["trec"])


def test_an_unreachable_hub_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"data.zip, put it into a folder as <task>.jsonl, unpacked, and give eval.source=local"
    ):
        load_rows(EvalConfig(source=TaskSource.hub), lambda task, text: True)


QUESTION = {"_id": "1", "question": " Which? ", "answer": "C", "context": "A long text."}
QUESTION |= {f"choice_{letter}": f"choice {letter}" for letter in "ABCD"}


def test_the_second_longbench_is_one_task_where_it_is_named(tmp_path):
    (tmp_path / "longbench_v2.json").write_text(json.dumps([QUESTION, QUESTION | {"_id": "2"}]))
    write(tmp_path, "qasper", [ROW])
    assert [task.name for task, _ in load(tmp_path)] == ["qasper"]
    [(task, rows)] = load(tmp_path, tasks=["longbench_v2"])
    prompt = task.render(rows[0])
    assert "question: Which?\nChoices:\n(A) choice A\n" in prompt and "<text>\nA long text.\n</text>" in prompt
    scores = {
        "The correct answer is (C).": 1.0,
        "**The correct answer is C**": 1.0,
        "The correct answer is (B)": 0.0,
        "C": 0.0,
        "The correct answer is A, no: The correct answer is (C)": 1.0,
    }
    assert {output: task.score(rows[0], output) for output in scores} == scores


def test_another_form_of_the_second_longbench_is_named(tmp_path):
    for content, message in (
        ("{", "not JSON"),
        ("{}", "row 1 lacks the columns"),
        ("[]", "holds no rows"),
        ('[{"_id": 1}]', "row 1 lacks the columns"),
    ):
        (tmp_path / "longbench_v2.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path, tasks=["longbench_v2"])
