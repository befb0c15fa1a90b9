"""Rows of LongBench as they are found: taken as what they clearly mean, or named with file and number."""

import json
import zipfile

import pytest

from conf.evaluation import EvalConfig, TaskSource
from eval.sources import load_rows, parse_rows, zip_rows
from eval.tasks import longbench_tasks
from tests.eval.test_sources import QUESTION, ROW

CLASSES = {"all_classes": ["A", "B"]}


def load(folder, name, content):
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    config = EvalConfig(source=TaskSource.local, data_dir=str(folder), tasks=[name.rpartition(".")[0]])
    return load_rows(config, lambda task, text: True)[0]


@pytest.mark.parametrize(
    ("name", "change", "output"),
    [
        ("qasper", {"answers": "Paris"}, "Paris"),
        ("qasper", {"answers": 1999}, "1999"),
        ("qasper", {"answers": [1999, "Paris"]}, "Paris"),
        ("qasper", {"input": None, "answers": ["Paris"]}, "Paris"),
        ("qasper", {"answers": ["Paris"], "self": 1, "context": 7, "_id": 8}, "Paris"),
        ("passage_retrieval_en", {"answers": ["3"]}, "It is paragraph 3"),
        ("passage_retrieval_en", {"answers": 3}, "Paragraph 3"),
        ("passage_retrieval_zh", {"answers": ["3"]}, "段落3"),
        ("passage_count", {"answers": [" 3 "]}, "3"),
        ("trec", {"answers": "A", **CLASSES}, "A"),
    ],
)
def test_what_clearly_means_the_same_is_taken_for_it(tmp_path, name, change, output):
    task, [row] = load(tmp_path, f"{name}.jsonl", json.dumps(ROW | change))
    assert task.score(row, output) == 1 and task.score(row, "no 4") == 0
    assert "None" not in task.render(row) and isinstance(row["_id"], str)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qasper", {"answers": None}, "has null as answers, not text"),
        ("qasper", {"answers": []}, "has no answers"),
        ("qasper", {"answers": [["A", "B"]]}, "has a list as answers, not text"),
        ("qasper", {"answers": {"text": ["A"]}}, "has an object as answers, not text"),
        ("qasper", {"answers": [True]}, "has true or false as answers"),
        ("qasper", {"context": None}, "has null as context, not text"),
        ("qasper", {"context": ["C"]}, "has a list as context, not text"),
        ("qasper", {"input": 0.5}, "has a number as input, not text"),
        ("qasper", {"_id": None}, "has null as _id, not text"),
        ("qasper", {"context": "C\ud800"}, r"holds the lone surrogate .ud800 .character 2. in context"),
        ("trec", {"answers": ["A"]}, "has no list of texts as all_classes"),
        ("lsht", {"answers": ["A"], "all_classes": []}, "has no list of texts as all_classes"),
        ("trec", {"answers": ["A"], "all_classes": "A"}, "has no list of texts as all_classes"),
        ("trec", {"answers": ["A"], "all_classes": ["A", None]}, "has no list of texts as all_classes"),
        ("passage_retrieval_en", {"answers": ["the third"]}, "has the answer 'the third'; .* wants a whole number"),
        ("passage_count", {"answers": ["7 of them"]}, "has the answer '7 of them'; .* wants a whole number"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path, name, change, message):
    good = json.dumps(ROW | {"answers": ["3"]} | CLASSES)
    with pytest.raises(ValueError, match=rf"{name}.jsonl:3 {message}"):
        load(tmp_path, f"{name}.jsonl", f"{good}\n\n{json.dumps(ROW | change)}\n{good}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{}]", "qasper.jsonl:1 lacks the columns"),
        ("5", "qasper.jsonl:1 is a number, not an object"),
        ("null", "qasper.jsonl:1 is null, not an object"),
        (json.dumps(ROW)[:-1] + ', "context": "D"}', "qasper.jsonl:1 has context more than once"),
        (json.dumps(ROW) + "\n" + "[" * 100_000, "qasper.jsonl:2 is nested too deep"),
        (json.dumps(ROW).encode().replace(b'"C"', b'"caf\xe9"'), "qasper.jsonl:1 holds the byte 0xe9, .* in context"),
        (json.dumps(ROW).encode("utf-16")[:-1], "cannot read .*qasper.jsonl: .*utf-16"),
        (b"", "qasper.jsonl holds no rows"),
        (json.dumps([ROW])[:-1], "cannot read .*qasper.jsonl: ends in the midst of its array"),
    ],
)
def test_files_of_other_forms_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "qasper.jsonl", content)


@pytest.mark.parametrize("text", [json.dumps([ROW, ROW], indent=1), f"\ufeff{json.dumps(ROW)}\r\n{json.dumps(ROW)}"])
def test_arrays_and_marks_of_windows_are_read(tmp_path, text):
    for encoding in ("utf-8", "utf-16"):
        assert len(load(tmp_path, "qasper.jsonl", text.removeprefix("\ufeff").encode(encoding))[1]) == 2
    assert len(load(tmp_path, "qasper.jsonl", text)[1]) == 2


def test_scorers_refuse_rows_that_were_read_for_no_task():
    [row] = parse_rows([json.dumps(ROW)], "rows")
    for name in ("trec", "passage_retrieval_en"):
        with pytest.raises(ValueError, match="all_classes|whole number"):
            longbench_tasks()[name].score(row, "A")


@pytest.mark.parametrize("answer", ["C", "c", " C. ", "(C)"])
def test_letters_of_the_second_longbench(tmp_path, answer):
    for content in (json.dumps([QUESTION | {"answer": answer}]), json.dumps(QUESTION | {"answer": answer})):
        task, [row] = load(tmp_path, "longbench_v2.json", content)
        assert task.score(row, "The correct answer is (C)") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "has the answer 'E'; it is one of the letters A, B, C, D"),
        ({"answer": "AC"}, "has the answer 'AC'"),
        ({"answer": ""}, "has the answer ''"),
        ({"answer": 2}, "has the answer '2'"),
        ({"answer": None}, "has null as answer, not text"),
        ({"choice_B": None}, "has null as choice_B, not text"),
        ({"context": ["C"]}, "has a list as context, not text"),
    ],
)
def test_questions_of_the_second_longbench_that_cannot_be_scored(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"longbench_v2.json, row 2 {message}"):
        load(tmp_path, "longbench_v2.json", json.dumps([QUESTION, QUESTION | change]))
    with pytest.raises(ValueError, match="longbench_v2.json, row 2 is text, not an object"):
        load(tmp_path, "longbench_v2.json", json.dumps([QUESTION, "row"]))


def test_damaged_zip_files_are_named(tmp_path):
    file = tmp_path / "data.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/qasper.jsonl", "\n".join(json.dumps(ROW | {"_id": str(n)}) for n in range(400)))
        archive.writestr("data/trec.jsonl", json.dumps(ROW))
    assert len(zip_rows(file, ["qasper"])[0][1]) == 400
    with pytest.raises(ValueError, match="data.zip:data/trec.jsonl:1 has no list of texts as all_classes"):
        zip_rows(file, ["trec"])
    whole = file.read_bytes()
    for damaged in (whole[:-30], whole[:200] + bytes(50) + whole[250:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read .*data.zip"):
            zip_rows(file, ["qasper"])
