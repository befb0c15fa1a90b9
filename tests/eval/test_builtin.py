"""Built-in tasks: deterministic, within the budget, and solvable: the true answer scores 1, another one less."""

import json
import re

import pytest

from conf.evaluation import BUILTIN_TASKS, EvalConfig
from eval.builtin import DEPTHS, LENGTHS, grid_cell, most_that_fit
from eval.prompts import Prompter, prompts_digest
from eval.sources import load_rows
from eval.text import code_files
from tests.eval.tiny import WINDOW, tokenizer

BUDGET = 800
FIELDS = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(tokenizer(), WINDOW, BUDGET)


@pytest.fixture(scope="module")
def rows(prompter) -> dict:
    loaded = load_rows(EvalConfig(limit=4), prompter.fits)
    return {task.name: (task, made) for task, made in loaded}


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_rows_have_longbenchs_fields_and_fill_the_budget(name, rows, prompter):
    task, made = rows[name]
    assert len(made) == len({row["_id"] for row in made}) == 4
    lengths = []
    for row in made:
        assert set(row) - {"depth", "share"} == FIELDS
        prompt = prompter.encode(task, row)
        assert not prompt.truncated
        lengths.append(len(prompt.ids))
    assert max(lengths) <= BUDGET
    # One more piece would not have fitted; pieces are far shorter than this.
    assert max(lengths) > BUDGET / 2


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_the_true_answer_scores_one_and_another_less(name, rows):
    task, made = rows[name]
    for row in made:
        truth = row["answers"][0]
        assert task.score(row, truth + "\n\nand so on, 1 2 3") == pytest.approx(1.0)
        wrong = (
            next(each for each in row["all_classes"] if each != truth) if row["all_classes"] else "31337 Paragraph 99"
        )
        assert task.score(row, wrong) < 0.6


def test_answers_follow_from_the_contexts(rows):
    for row in rows["passkey"][1]:
        assert f"The pass key is {row['answers'][0]}." in row["context"]
    for row in rows["key_value"][1]:
        assert json.loads(row["context"])[row["input"]] == row["answers"][0]
    for row in rows["passage_retrieval"][1]:
        paragraphs = re.split(r"\n\n(?=Paragraph \d+: )", row["context"])
        holders = [text.split(":")[0] for text in paragraphs if row["input"].rstrip(".") in text]
        assert row["answers"][0] in holders
    for row in rows["passage_count"][1]:
        paragraphs = [text.split(": ", 1)[1] for text in re.split(r"\n\n(?=Paragraph \d+: )", row["context"])]
        assert row["answers"] == [str(len(set(paragraphs)))]
    for row in rows["classification"][1]:
        assert row["answers"][0] in row["all_classes"] and len(row["all_classes"]) >= 3
        assert row["input"].removesuffix("\nTopic:") not in row["context"]
    for row in rows["code_completion"][1]:
        *_, last = row["context"].split("\n")
        assert row["answers"][0].strip() and any(
            f"\n{last}\n{row['answers'][0]}\n" in "\n".join(lines) for lines, _ in code_files()
        )


def test_pass_keys_lie_on_a_grid_of_depth_and_length(prompter):
    cells = {tuple(grid_cell(index).values()) for index in range(DEPTHS * LENGTHS)}
    assert len(cells) == DEPTHS * LENGTHS and {share for _, share in cells} == {0.25, 0.5, 0.75, 1.0}
    [(task, made)] = load_rows(EvalConfig(limit=DEPTHS * LENGTHS, tasks=["passkey"]), prompter.fits)
    for row in made:
        lines = row["context"].split("\n")
        place = next(number for number, line in enumerate(lines) if line.startswith("The pass key is"))
        assert place == round(row["depth"] * (len(lines) - 1))
    words = {share: [row["length"] for row in made if row["share"] == share] for share in (0.25, 1.0)}
    assert max(words[0.25]) < min(words[1.0])
    assert max(len(prompter.encode(task, row).ids) for row in made) <= BUDGET


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(rows, prompter):
    def digests(seed: int, limit: int) -> list[str]:
        loaded = load_rows(EvalConfig(limit=limit, seed=seed), prompter.fits)
        return [prompts_digest([prompter.encode(task, row) for row in made]) for task, made in loaded]

    first = [prompts_digest([prompter.encode(task, row) for row in made]) for task, made in rows.values()]
    assert digests(0, 4) == first
    assert all(a != b for a, b in zip(digests(1, 4), first, strict=True))


def test_fill_takes_the_most_that_fits():
    for room in range(1, 12):
        found = most_that_fit(lambda n: {"n": n}, 9, lambda row, room=room: row["n"] <= room)
        assert found == min(room, 9)
    assert most_that_fit(lambda n: {"n": n}, 9, lambda row: False) == 0


def test_a_budget_too_small_for_any_row_is_an_error():
    small = Prompter(tokenizer(), WINDOW, 12)
    with pytest.raises(ValueError, match="eval.max_length is too small"):
        load_rows(EvalConfig(limit=1, tasks=["passkey"]), small.fits)
