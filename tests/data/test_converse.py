"""Conversations of the original with itself: made once, for training alone, and resumed to the same words."""

import json
import math
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from conf.plan import Plan
from conf.schema import Config, DataConfig, DocumentEnd, SourceConfig, SourceKind
from data.calibration import calibration_batches, heldout_batches
from data.chats import as_text, chat_tokens
from data.converse import converse, generated_share, read_chats
from data.draw import open_sources
from data.sample import sample
from data.sources import written_sources
from data.speaker import REQUESTS, Speaker, user_turn
from data.workers import encode
from tests.data.corpora import WORDS, documents, local, make_config, write_jsonl
from tests.data.test_sample import pieces, read_rows

EOS = len(WORDS) + 1
# A user's turn begins with w0, an answer with w1; no plain document of these tests holds either.
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w0', 'assistant': 'w1'}[m.role] }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)
END = 0.06  # of 16 words, the room of a turn here, 63 % come to an end
GENERATED = SourceConfig(kind=SourceKind.generated)


def chat_model(tmp_path: Path, **data: object) -> Config:
    """A random model with a chat template, and a source of text beside the generated one."""
    texts = [text.replace("w0 ", "w2 ").replace("w1 ", "w2 ") for text in documents(600)]
    plain = local(write_jsonl(tmp_path / "a.jsonl", [f"w2 {text} w2" for text in texts]))
    config = make_config(tmp_path, {"plain": plain, "own": GENERATED}, **data)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(config.model.path)
    if not (Path(config.model.path) / "config.json").exists():
        write_speaker(Path(config.model.path))
    return config


def write_speaker(folder: Path) -> None:
    """A model that says any word at any time, each as likely, and comes to an end at every word with probability END.

    So how much ends is known, whatever kernels compute it: all its states are the same, and only the head tells tokens.
    """
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=EOS + 1, eos_token_id=EOS, pad_token_id=EOS, **sizes))
    with torch.no_grad():
        for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            layer.weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[0, 0] = -100.0  # the unknown word
        model.lm_head.weight[EOS, 0] = math.log(END / (1 - END) * len(WORDS))
    model.save_pretrained(folder)


def files(config: Config) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(Plan(config).converse.folder.glob("*.jsonl"))}


def test_a_sample_of_text_and_what_the_model_says(tmp_path: Path) -> None:
    config = chat_model(tmp_path)
    converse(config)
    sample(config)
    manifest = json.loads((Plan(config).sample.folder / "manifest.json").read_text())
    assert manifest["sources"]["own"]["tokens"] == 3200 and manifest["tokens"] == 6400
    assert manifest["sources"]["own"]["validation_tokens"] == 0  # validation is of real text
    ids, positions = read_rows(config, "train")
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    [source] = [each for name, each in written_sources(config, tokenizer).items() if name == "own"]
    said = [chat for file in files(config) for chat in read_chats(Plan(config).converse.folder / file)]
    assert source.messages_column and {len(chat) for chat in said} == {2}
    expected = {tuple(row.tolist()) for row in encode(tokenizer, [as_text(chat) for chat in said], None)}
    assert sum(stretch in expected for stretch in pieces(ids, positions)) > 10
    held_out, _ = read_rows(config, "validation")
    assert (ids == 1).any() and not (held_out == 1).any()
    calibration = torch.cat(list(calibration_batches(config, tokenizer, tokens=2048, sequence_length=64)))
    measured = torch.cat(list(heldout_batches(config, tokenizer, tokens=1024, sequence_length=64)))
    assert (calibration == 1).any(1).float().mean() > 0.3 and not (measured == 1).any()


def test_half_of_it_is_about_passages_of_the_other_sources(tmp_path: Path) -> None:
    config = chat_model(tmp_path)
    converse(config)
    plain = {text for text in (tmp_path / "a.jsonl").read_text().split('"') if " " in text}
    asked = [chat[0]["content"] for name in files(config) for chat in read_chats(Plan(config).converse.folder / name)]
    about = [text for text in asked if any(request in text for request in REQUESTS)]
    assert 0.5 < len(about) / len(asked) < 0.8  # its own questions do not always come to an end: 0.64 is expected
    passages = [part for text in about for part in text.split("\n\n") if part not in REQUESTS]
    assert sum(any(part in text for text in plain) for part in passages) > 0.9 * len(passages)


def spoken(config: Config) -> list[tuple[list[dict[str, str]], list[int]]]:
    """Every conversation with its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    chats = [chat for name in files(config) for chat in read_chats(Plan(config).converse.folder / name)]
    return [(chat, chat_tokens(tokenizer, as_text(chat))) for chat in chats]


@pytest.mark.parametrize("end", ["auto", "eos"])
def test_an_answer_without_an_end_teaches_none(tmp_path: Path, end: str) -> None:
    """Whatever ends plain documents, in the sample as in the tokens."""
    config = chat_model(tmp_path, document_end=DocumentEnd(end))
    converse(config)
    said = spoken(config)
    assert 0.3 < np.mean([bool(chat[-1]["ended_by"]) for chat, _ in said]) < 0.9  # 0.60 is expected
    assert all((ids[-1] == EOS) == bool(chat[-1]["ended_by"]) for chat, ids in said)
    sample(config)
    found = set(pieces(*read_rows(config, "train")))
    whole = [bool(chat[-1]["ended_by"]) for chat, ids in said if tuple(ids) in found]
    assert len(whole) > 10 and 0 < sum(whole) < len(whole)


def test_answers_are_kept_as_they_were_said(tmp_path: Path) -> None:
    """A template that takes thoughts out of past answers, or adds empty ones, does not get to see them."""
    config = chat_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    said = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w8 w9", "ended_by": "<eos>"}]
    tokenizer.chat_template = TEMPLATE.replace("m.content }}", "m.content.split('w8')[-1] }}")
    assert chat_tokens(tokenizer, as_text(said)) == [1, 6, EOS, 2, 9, 10, EOS]
    given = [each | {} for each in said]
    del given[1]["ended_by"]
    assert chat_tokens(tokenizer, as_text(given)) == [1, 6, EOS, 2, 10, EOS]


def speaker_of(config: Config, texts: Iterable[str] = ()) -> Speaker:
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    return Speaker(LlamaForCausalLM.from_pretrained(config.model.path), tokenizer, iter(texts), 64, 0)


def test_a_question_ends_where_the_template_begins_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every template ends a user's turn with eos: the model's own answer is no part of its question."""
    config = chat_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tokenizer.chat_template = "{% for m in messages %}w0 {{ m.content }} w9 {% endfor %}"
    tokenizer.save_pretrained(config.model.path)
    speaker = speaker_of(config)
    assert user_turn(speaker.tokenizer) == ("w0 ", "w9")
    assert speaker.said([6, 7, 10, 8, EOS, EOS], "w9") == ("w5 w6 ", "w9")
    assert speaker.said([6, 7, 8, EOS, EOS], "w9") == ("w5 w6 w7", "<eos>")
    assert speaker.said([6, 7, 8], "w9") == ("w5 w6 w7", "")
    asked = speaker.questions(64)
    assert len(asked) > 10 and all("w9" not in question.split() for question in asked)


def test_a_model_without_numbers_says_nothing(tmp_path: Path) -> None:
    speaker = speaker_of(chat_model(tmp_path))
    speaker.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite after 1 tokens"):
        speaker.conversations(0)


def test_settings_of_the_checkpoint_do_not_narrow_what_is_said(tmp_path: Path) -> None:
    config = chat_model(tmp_path)
    before = speaker_of(config).conversations(0)
    settings = {"top_p": 0.1, "repetition_penalty": 1.3, "eos_token_id": EOS, "max_length": 30}
    GenerationConfig(do_sample=True, **settings).save_pretrained(config.model.path)
    assert speaker_of(config).conversations(0) == before


def test_special_tokens_of_passages_stay_out_of_conversations(tmp_path: Path) -> None:
    speaker = speaker_of(chat_model(tmp_path), cycle(["w5 <eos> w6 " * 50]))
    texts = speaker.passages(0)
    assert len(texts) == 16 and all("<eos>" not in text and "w6" in text for text in texts)


def test_a_killed_run_goes_on_with_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chat_model(tmp_path, name="whole", tokens=12800)
    converse(whole)
    assert len(files(whole)) > 2 and len(set(files(whole).values())) == len(files(whole))
    killed = chat_model(tmp_path, name="killed", tokens=12800)
    speak = Speaker.conversations

    def once(self: Speaker, number: int) -> list[list[dict[str, str]]]:
        if number == 1 and not (tmp_path / "been").exists():
            (tmp_path / "been").touch()
            raise KeyboardInterrupt
        return speak(self, number)

    monkeypatch.setattr(Speaker, "conversations", once)
    with pytest.raises(KeyboardInterrupt):
        converse(killed)
    assert len(files(killed)) == 1
    with pytest.raises(FileNotFoundError, match="stage 'converse' .* has not finished; run `make converse`"):
        sample(killed)
    converse(killed)
    assert files(killed) == files(whole)
    again = Plan(killed).converse.record()
    converse(killed)  # finished: nothing is said anew
    assert Plan(killed).converse.record() == again


def test_what_the_original_says_is_part_of_the_keys(tmp_path: Path) -> None:
    config = chat_model(tmp_path)
    plan = Plan(config)
    assert plan.stages[0].name == "converse"
    longer = Plan(chat_model(tmp_path, tokens=12800))
    assert plan.convert.key != longer.convert.key and plan.sample.key != longer.sample.key
    other = Plan(chat_model(tmp_path, allow_short=True, validation_tokens=64))  # nothing is said anew for these
    assert (plan.converse.key, plan.convert.key) == (other.converse.key, other.convert.key)
    config.data.sources.pop("own")
    assert "converse" not in [stage.name for stage in Plan(config).stages]


def test_questions_begin_where_the_template_lets_a_user_speak(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model(tmp_path).model.path)
    assert user_turn(tokenizer) == ("w0 ", "<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role | upper }}{% endfor %}"
    assert user_turn(tokenizer) == ("", None)


def test_what_cannot_be_generated(tmp_path: Path) -> None:
    plain = SourceConfig(data_files=["a"])
    for sources in ({"own": GENERATED}, {"plain": plain, "own": GENERATED, "more": GENERATED}):
        with pytest.raises(ValueError, match="one source of kind=generated, and others beside it"):
            DataConfig(sources=sources)
    with pytest.raises(ValueError, match="data.sources.own: kind=generated knows a weight and nothing else"):
        DataConfig(sources={"plain": plain, "own": SourceConfig(kind=SourceKind.generated, name="prose")})
    config = chat_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tokenizer.chat_template = None
    (Path(config.model.path) / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(config.model.path)
    with pytest.raises(ValueError, match="kind=generated: the tokenizer of .* has no chat template"):
        converse(config)
    with pytest.raises(ValueError, match="data.sources.own: the tokenizer of .* has no chat template"):
        open_sources(config, tokenizer)
    assert np.isclose(generated_share(config), 0.5)
    config.data.sources.pop("own")
    with pytest.raises(ValueError, match="no source of kind=generated among data.sources"):
        converse(config)


def test_a_model_that_says_the_same_again_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = chat_model(tmp_path)
    monkeypatch.setattr(Speaker, "answered", lambda self, questions: [])
    with pytest.raises(ValueError, match="nothing more to say to itself after 0 conversations of 0 tokens"):
        converse(config)


def test_what_conversion_refuses_is_refused_before_anything_is_said(tmp_path: Path) -> None:
    config = chat_model(tmp_path)
    config.mla.rope_dim = 3
    with pytest.raises(ValueError, match="rope_dim"):
        converse(config)
    assert not Plan(config).converse.folder.exists()


def test_only_conversations_beside_it_give_no_passages(tmp_path: Path) -> None:
    """Nothing to ask about: all of it is free, and nothing waits for texts that never come."""
    config = chat_model(tmp_path)
    rows = [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": text}]} for text in WORDS]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.sources["plain"] = local(tmp_path / "talk.jsonl", messages_column="messages")
    converse(config)
    asked = [chat[0]["content"] for name in files(config) for chat in read_chats(Plan(config).converse.folder / name)]
    assert asked and not any(request in text for text in asked for request in REQUESTS)
