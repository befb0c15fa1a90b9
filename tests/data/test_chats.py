"""Conversations as a source: written by the chat template, beside plain text, in every stage that reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from conf.plan import Plan
from conf.schema import Config, SourceConfig
from data.calibration import calibration_batches
from data.chats import as_text, is_chat
from data.documents import LONGEST, pieces
from data.sample import sample
from data.sources import list_parts, read_texts
from data.workers import encode
from tests.data.corpora import WORDS, documents, local, make_config, write_jsonl
from tests.data.test_sample import pieces as stretches
from tests.data.test_sample import read_rows

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
EOS = len(WORDS) + 1


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("w0", "w1")[n % 2], "content": content} for n, content in enumerate(contents)]


def write_chats(path: Path, chats: list[Any], column: str = "messages") -> SourceConfig:
    path.write_text("".join(json.dumps({"n": n, column: each}) + "\n" for n, each in enumerate(chats)))
    return local(path, messages_column=column)


def with_template(config: Config) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(config.model.path)
    return tokenizer


def texts_of(source: SourceConfig) -> list[str]:
    return [text for part in list_parts("corpus", source, 0) for text in read_texts(part)]


def test_rows_of_messages_from_json_lines_and_parquet(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "a.jsonl", [chat("w3 ", "w4"), None, []])
    assert texts_of(source) == [as_text(chat("w3 ", "w4"))]
    pq.write_table(pa.table({"messages": [chat("w3 ", "w4")], "other": [1]}), tmp_path / "b.parquet")
    assert texts_of(local(tmp_path / "b.parquet", messages_column="messages")) == texts_of(source)
    lists = {name: [each[name] for each in chat("w3 ", "w4")] for name in ("role", "content")}
    pq.write_table(pa.table({"messages": [lists]}), tmp_path / "c.parquet")  # as older datasets stored them
    assert texts_of(local(tmp_path / "c.parquet", messages_column="messages")) == texts_of(source)


def test_tools_and_thoughts_reach_the_template_and_silence_is_left_out(tmp_path: Path) -> None:
    call = {"role": "w1", "content": None, "tool_calls": [{"function": {"name": "w7"}}]}
    silent = {"role": "w1", "content": None}
    source = write_chats(tmp_path / "a.jsonl", [[*chat("w3"), call], [*chat("w4"), silent]])
    [text] = texts_of(source)
    assert json.loads(text[1:])[1] == {"role": "w1", "tool_calls": call["tool_calls"]}


def test_no_plain_document_is_taken_for_a_conversation(tmp_path: Path) -> None:
    pretender = as_text(chat("w3"))
    assert is_chat(pretender)
    texts = texts_of(local(write_jsonl(tmp_path / "a.jsonl", [pretender, f" {pretender}"])))
    assert len(texts) == 2 and not any(map(is_chat, texts))


def test_tokens_are_those_of_the_chat_template(tmp_path: Path) -> None:
    """Turns end where the template says, and special tokens of plain text stay text, in one batch."""
    tokenizer = with_template(make_config(tmp_path, {}))
    plain, talk = "w5 <eos> w6", as_text(chat("w3", "w4"))
    for end in (None, EOS):
        first, second, third = encode(tokenizer, [plain, talk, plain], end)
        assert second.tolist() == [1, 4, EOS, 2, 5, EOS]
        assert first.tolist() == third.tolist() == ([6, 0, 7] if end is None else [6, 0, 7, EOS])


def test_a_long_conversation_is_not_cut_as_text() -> None:
    [(_, whole)] = pieces(b"0" * 16, as_text(chat("w3 " * LONGEST)))
    assert is_chat(whole) and len(whole) > LONGEST
    assert len(list(pieces(b"0" * 16, "w3 " * LONGEST))) > 1


def test_a_sample_and_calibration_of_text_and_conversations(tmp_path: Path) -> None:
    texts, words = documents(900, 0, 10, 20), documents(1800, 1, 5, 10)
    chats = [chat(question, answer) for question, answer in zip(words[::2], words[1::2], strict=True)]
    sources = {
        "plain": local(write_jsonl(tmp_path / "a.jsonl", texts)),
        "chats": write_chats(tmp_path / "chats.jsonl", chats),
    }
    config = make_config(tmp_path, sources)
    tokenizer = with_template(config)
    sample(config)
    twice = make_config(tmp_path, sources, name="two", num_workers=2)
    sample(twice)
    shards = [
        json.loads((Plan(each).sample.folder / "manifest.json").read_text())["shards"] for each in (config, twice)
    ]
    assert shards[0] == shards[1]
    ids, positions = read_rows(config, "train")
    expected = {tuple(row.tolist()) for row in encode(tokenizer, [as_text(each) for each in chats], None)}
    found = [stretch for stretch in stretches(ids, positions) if stretch in expected]
    assert len(found) > 15
    assert 0.3 < sum(map(len, found)) / ids.size < 0.6  # half of the tokens, but for those cut by rows
    batches = [batch.numpy() for batch in calibration_batches(config, tokenizer, tokens=2048, sequence_length=64)]
    shares = [(row == EOS).any() for row in np.concatenate(batches)]
    assert 0.3 < np.mean(shares) < 0.7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": "hello"}', "a.jsonl: row 1: a conversation is a list of {role, content}, not hello"),
        (
            '{"messages": [{"from": "human", "value": "w3"}]}',
            "a.jsonl: row 1: a conversation is a list of {role, content}",
        ),
        ('{"text": "w3"}', "messages_column=messages: .*a.jsonl has no such column; it has text"),
    ],
)
def test_rows_that_are_no_conversations(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError, match=message):
        texts_of(local(tmp_path / "a.jsonl", messages_column="messages"))


def test_what_cannot_hold_or_write_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w3")
    with pytest.raises(ValueError, match="a text file holds no conversations; messages_column needs JSON"):
        texts_of(local(tmp_path / "a.txt", messages_column="messages"))
    source = write_chats(tmp_path / "a.jsonl", [chat("w3", "w4")] * 50)
    config = make_config(tmp_path, {"talk": source})
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    for read in (sample, lambda config: calibration_batches(config, tokenizer)):
        with pytest.raises(ValueError, match="data.sources.talk: .* has no chat template .*; use plain text"):
            read(config)
    for template, why in (("{{ raise_exception('roles alternate') }}", "roles alternate"), ("{{ 1 + 'a' }}", "int")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(config.model.path)
        with pytest.raises(ValueError, match=f"chat template refuses a conversation .*{why}.*leave such rows out"):
            sample(config)
    with pytest.raises(ValueError, match="text_column and messages_column are both given"):
        SourceConfig(data_files=["a"], text_column="body", messages_column="messages").check("data.sources.a")


def test_a_conversation_that_the_template_refuses_is_skipped_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = documents(1800, 1, 5, 10)
    chats = [chat(question, answer) for question, answer in zip(words[::2], words[1::2], strict=True)]
    wrong = [{"role": "w9", "content": f"w5 w{n}"} for n in range(8)]
    template = "{% if messages[0].role == 'w9' %}{{ raise_exception('begin with w0') }}{% endif %}" + TEMPLATE
    for count in (2, 900):
        each = [[wrong[n % 8], {"role": "w1", "content": f"w{n}"}] for n in range(count)]
        source = write_chats(tmp_path / "a.jsonl", each + chats)
        config = make_config(tmp_path, {"talk": source}, name=f"{count}", tokens=12_800)
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(config.model.path)
        if count > 2:
            with pytest.raises(ValueError, match="refuses a conversation .begin with w0.*w9"):
                sample(config)
            with pytest.raises(ValueError, match="refuses a conversation .begin with w0.*of .* rows are bad"):
                calibration_batches(config, tokenizer, tokens=10_000, sequence_length=64)
        else:
            sample(config)
            manifest = json.loads((Plan(config).sample.folder / "manifest.json").read_text())
            found = manifest["sources"]["talk"]["skipped"]
            assert 0 < found["bad_rows"] <= 2 and "begin with w0" in found["first_bad"]
            assert "begin with w0" in capsys.readouterr().out
