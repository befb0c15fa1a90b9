"""LongBench v2 (arXiv 2412.15204): 503 questions of four choices over long texts, as one task.

Prompt and reading of the answer are its repository's, without examples and without reasoning; an over-long text loses
its middle there too. Rows are its `data.json`, from the hub or as `longbench_v2.json` in a folder.
"""

import json
import re
from pathlib import Path
from typing import Any

from conf.evaluation import LONGBENCH_V2
from eval.tasks import Row, Task

HUB_REPOSITORY, HUB_FILE = "THUDM/LongBench-v2", "data.json"
LETTERS = "ABCD"
COLUMNS = ("_id", "question", *(f"choice_{letter}" for letter in LETTERS), "answer", "context")

PROMPT = """\
Please read the following text and answer the question below.

<text>
{{context}}
</text>

What is the correct answer to this question: {{question}}
Choices:
(A) {{choice_A}}
(B) {{choice_B}}
(C) {{choice_C}}
(D) {{choice_D}}

Format your response as follows: "The correct answer is (insert answer here)"."""


def choice_score(row: Row, outputs: list[str]) -> dict[str, float]:
    """Whether an output says "The correct answer is (X)" of the right X, or else the same without brackets."""
    said = outputs[0].replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", said) or re.search(r"The correct answer is ([A-D])", said)
    return {"score": float(found is not None and found[1] in row["answers"])}


TASK = Task(LONGBENCH_V2, PROMPT, 128, choice_score, "1")


def read(file: Path) -> list[Row]:
    """Rows of a `data.json`, in the form of LongBench v1's with the choices beside; ValueError for another form."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file} holds no rows: a list of questions is wanted")
    return [row_of(row, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def row_of(row: dict[str, Any], place: str) -> Row:
    missing = [column for column in COLUMNS if column not in row]
    if missing:
        raise ValueError(f"{place} lacks the columns {', '.join(missing)}; it has {', '.join(row)}")
    texts = {column: row[column].strip() for column in COLUMNS if column not in ("_id", "answer")}
    return row | texts | {"input": texts["question"], "answers": [row["answer"]], "all_classes": None}
