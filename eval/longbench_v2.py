"""LongBench v2 (arXiv 2412.15204): 503 questions of four choices over long texts, as one task.

Prompt and reading of the answer are its repository's, without examples and without reasoning; an over-long text loses
its middle there too. Rows are its `data.json`, from the hub or as `longbench_v2.json` in a folder.
"""

import re
from pathlib import Path

from conf.evaluation import LONGBENCH_V2
from eval.rows import checked_rows, rows_of_file, text
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
    return checked_rows(rows_of_file(file), str(file), COLUMNS, row_of, before=", row ")


def row_of(row: Row) -> Row:
    texts = {column: text(row, column).strip() for column in COLUMNS if column not in ("_id", "answer")}
    return texts | {
        "_id": text(row, "_id"),
        "input": texts["question"],
        "answers": [letter(text(row, "answer"))],
        "all_classes": None,
    }


def letter(answer: str) -> str:
    """A right answer as its letter alone."""
    found = answer.strip(" \t\r\n().").upper()
    if found not in tuple(LETTERS):
        raise ValueError(f"has the answer {answer[:100]!r}; it is one of the letters {', '.join(LETTERS)}")
    return found
