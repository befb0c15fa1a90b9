"""Middle truncation, windows and chat templates."""

import dataclasses

import pytest

from eval.builtin import builtin_rows
from eval.prompts import Prompter, prompts_digest
from eval.tasks import builtin_tasks, longbench_tasks
from tests.eval.tiny import WINDOW, tokenizer

WORDS = " ".join(f"word{i}" for i in range(400))
ROW = {"input": "What?", "context": WORDS, "answers": ["A"], "all_classes": None, "_id": "0"}
QA = longbench_tasks()["qasper"]


def test_a_short_prompt_is_left_as_it_is():
    row = ROW | {"context": "short"}
    prompt = Prompter(tokenizer(), WINDOW).encode(QA, row)
    assert not prompt.truncated
    assert prompt.ids.tolist() == tokenizer()(QA.render(row))["input_ids"]


@pytest.mark.parametrize("limit", [600, 601])
def test_a_long_prompt_loses_its_middle_and_keeps_both_ends(limit):
    prompt = Prompter(tokenizer(), WINDOW, limit).encode(QA, ROW)
    assert prompt.truncated and limit - 4 <= len(prompt.ids) <= limit
    text, whole = tokenizer().decode(prompt.ids, skip_special_tokens=True), QA.render(ROW)
    assert text.startswith(whole[:100]) and text.endswith("Question: What?\n\nAnswer:")
    # LongBench's own steps: halves of the ids, decoded and joined, tokenised again.
    ids = tokenizer()(whole)["input_ids"]
    half = limit // 2
    halves = [tokenizer().decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:])]
    assert text == "".join(halves)


def test_the_limit_leaves_room_for_the_output():
    prompter = Prompter(tokenizer(), WINDOW)
    assert prompter.limit(QA) == WINDOW - 128
    assert prompter.limit(longbench_tasks()["gov_report"]) == WINDOW - 512
    assert Prompter(tokenizer(), WINDOW, 100).limit(QA) == 100
    with pytest.raises(ValueError, match="wants 128 output tokens"):
        Prompter(tokenizer(), 100).limit(QA)
    with pytest.raises(ValueError, match=f"eval.max_length=2000 is larger than the model's window of {WINDOW}"):
        Prompter(tokenizer(), WINDOW, 2000)


def test_the_chat_template_wraps_after_the_cut_and_stays_whole():
    prompt = Prompter(tokenizer(), WINDOW, 600, chat=True).encode(QA, ROW)
    text = tokenizer().decode(prompt.ids)
    assert prompt.truncated and len(prompt.ids) <= 600
    assert text.startswith("[user] You are given") and text.endswith("Answer:\n[assistant]")
    # LongBench gives few-shot tasks without it, whatever the setting.
    plain = Prompter(tokenizer(), WINDOW, 600, chat=True).encode(builtin_tasks()["classification"], ROW)
    assert "[user]" not in tokenizer().decode(plain.ids)


def test_a_tokenizer_without_a_template_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    with pytest.raises(ValueError, match="eval.chat_template=on"):
        Prompter(tokenizer(), WINDOW, chat=True)


def test_the_digest_knows_order_and_bounds():
    prompter = Prompter(tokenizer(), WINDOW, 300)
    short = dataclasses.replace(QA, prompt="{{context}}")
    a, b, ab = (prompter.encode(short, ROW | {"context": text}) for text in ("one", "two", "onetwo"))
    assert len({prompts_digest(each) for each in ([a, b], [b, a], [ab], [a])}) == 4


def test_rows_that_are_made_do_not_grow_with_an_endless_window(monkeypatch):
    monkeypatch.setattr("eval.prompts.LONGEST_MADE", 500)
    passkey = builtin_tasks()["passkey"]
    lengths = {}
    for max_length in (None, 900):
        prompter = Prompter(tokenizer(), 10_000_000, max_length)
        rows = builtin_rows(passkey, 4, 0, lambda text: prompter.fits(passkey, text))  # noqa: B023
        lengths[max_length] = max(len(prompter.encode(passkey, row).ids) for row in rows)
    assert 300 < lengths[None] <= 500 < lengths[900] <= 900
    # A row that is given is not cut for it.
    assert not Prompter(tokenizer(), 10_000_000).encode(QA, ROW).truncated
    assert len(Prompter(tokenizer(), 10_000_000).encode(QA, ROW).ids) > 500
