"""Conversations and code for distances are not those that training reads."""

import json
from pathlib import Path

import pytest
import torch

from conf.plan import Plan
from data.chats import as_text
from data.documents import TRAIN, VALIDATION, Split, train_tokens
from data.workers import encode
from eval import unseen
from eval.unseen import code, unseen_texts
from tests.eval.tiny import compose_config, tokenizer, write_original

CHATS = [
    [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"Number {i} is {i * i}, nearly."}]
    for i in range(60)
]


def written(tmp_path: Path, *words: str) -> list[str]:
    write_original(tmp_path)
    chats = "\n".join(json.dumps({"messages": chat}) for chat in CHATS)
    (tmp_path / "chats.jsonl").write_text(chats)
    source = f"{{data_files:[{tmp_path / 'chats.jsonl'}],messages_column:messages}}"
    return [f"+data.sources={{chats:{source}}}", "eval.divergence_tokens=200", *words]


def decoded(windows: list[torch.Tensor]) -> str:
    return " ".join(tokenizer().decode(window) for window in windows)


def test_held_out_conversations_of_a_source_are_read(tmp_path: Path) -> None:
    config = compose_config(tmp_path, *written(tmp_path, "eval.perplexity_sequence_length=128"))
    found, split = unseen_texts(config, tokenizer(), 200), Split.of(config)
    assert set(found) == {"conversations", "code"}
    sides = {side: [c for c in CHATS if split.place(split.key(as_text(c)))[0] == side] for side in (TRAIN, VALIDATION)}
    text = decoded(found["conversations"])
    assert sum(chat[0]["content"] in text for chat in sides[VALIDATION]) == len(found["conversations"]) > 1
    assert sides[TRAIN] and not any(chat[0]["content"] in text for chat in sides[TRAIN])
    assert sum(map(len, found["conversations"])) <= 200 and sum(map(len, found["code"])) == 200
    assert unseen_texts(config, tokenizer(), 0) == {}


def test_of_generated_conversations_those_that_the_sample_left_over(tmp_path: Path) -> None:
    words = ["data=chat", "data.tokens=4096", "eval.divergence_tokens=200"]
    write_original(tmp_path)
    config = compose_config(tmp_path, *words)
    plan, split = Plan(config), Split(config.data.seed, 0.0)
    texts = sorted(map(as_text, CHATS), key=split.key)
    sizes = [len(encode(tokenizer(), [text], None)[0]) for text in texts]
    wanted = round(0.25 * train_tokens(config))
    assert sum(sizes) > wanted > 0
    with plan.converse.run() as stage:
        (stage.folder / "conversations-00000.jsonl").write_text("\n".join(json.dumps({"messages": c}) for c in CHATS))
        stage.metrics["tokens"] = sum(sizes)
    text = decoded(unseen_texts(config, tokenizer(), 200)["conversations"])
    taken = next(place for place in range(len(sizes)) if sum(sizes[: place + 1]) >= wanted) + 1
    asked = [json.loads(each[1:])[0]["content"] for each in texts]
    assert not any(question in text for question in asked[:taken])
    assert any(question in text for question in asked[taken:])


def test_code_is_held_out_where_training_reads_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_original(tmp_path)
    seen: list[str] = []
    monkeypatch.setattr(unseen, "alternate", lambda parts, skipped: iter(seen))
    seen += [f"def f{i}():\n    return {i}\n" for i in range(300)]
    trained, other = (compose_config(tmp_path, *words) for words in ((), ("data=local", "data.files=[x.jsonl]")))
    split = Split.of(trained)
    expected = [text for text in seen if split.place(split.key(text))[0] == VALIDATION]
    assert list(code(trained)) == expected and 0 < len(expected) < 300
    assert list(code(other)) == seen


def test_without_a_chat_template_there_are_no_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose_config(tmp_path, *written(tmp_path))
    plain = tokenizer.__wrapped__()
    plain.chat_template = None
    assert set(unseen_texts(config, plain, 100)) == {"code"}
    assert "no conversations that training has not seen" in capsys.readouterr().out
