"""Rows from folders, zip files and a hub that cannot be reached."""

import json
import zipfile

import pytest

from conf.schema import EvalConfig, TaskSource
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
    with pytest.raises(ValueError, match=r"data.zip, unpack it, and give eval.source=local eval.data_dir"):
        load_rows(EvalConfig(source=TaskSource.hub), lambda task, text: True)
