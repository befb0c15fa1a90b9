"""A document or prompt begins as its tokenizer begins it and never ends with what that appends; ids are the model's."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers import PreTrainedTokenizerFast as Fast

from conf.schema import Config, DocumentEnd
from data.chats import as_text
from data.converse import converse
from data.sample import sample
from data.tokens import added_ids, begun_ids, check_ids, plain_ids
from data.workers import encode
from eval import positions
from eval.prompts import Prompter
from eval.tasks import builtin_tasks
from tests.data.corpora import documents, local, make_config, write_jsonl
from tests.data.test_converse import chat_model
from train.convert import run as run_convert
from train.finetune import text_rows

SPECIAL = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]"]
WORDS = [f"w{number}" for number in range(100)]
UNK, BOS, EOS, CLS, SEP = range(5)


def words(single: str | None, **options: Any) -> Any:
    """A tokenizer of words that adds what a template says."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single:
        special = [(token, number) for number, token in enumerate(SPECIAL)]
        special += [("w7", len(SPECIAL) + 7)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    given = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "sep_token": "[SEP]"} | options
    return Fast(tokenizer_object=tokenizer, **given)


def llama(**options: Any) -> Any:
    """Which says with options of its own what it adds, as Gemma does."""
    return LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}, merges=[], **options)


TOKENIZERS: dict[str, tuple[Callable[[], Any], list[int], list[int]]] = {
    "nothing": (lambda: words(None), [], []),
    "bos": (lambda: words("<s> $A"), [BOS], []),
    "eos": (lambda: words("$A </s>"), [], [EOS]),
    "bos and eos": (lambda: words("<s> $A </s>"), [BOS], [EOS]),
    "as BERT": (lambda: words("[CLS] $A [SEP]"), [CLS], [SEP]),
    "several": (lambda: words("<s> [CLS] $A [SEP] </s>"), [BOS, CLS], [SEP, EOS]),
    "bos twice": (lambda: words("<s> <s> $A"), [BOS, BOS], []),
    "eos in front": (lambda: words("</s> $A"), [EOS], []),
    "unknown behind": (lambda: words("$A <unk>", eos_token="<unk>"), [], [UNK]),
    "an ordinary word": (lambda: words("$A w7"), [], [len(SPECIAL) + 7]),
    "without special tokens": (lambda: words("$A </s>", bos_token=None, eos_token=None), [], [EOS]),
    "add_eos_token": (lambda: llama(add_eos_token=True), [], [EOS]),
    "add_bos_token": (lambda: llama(add_bos_token=True, add_eos_token=True), [BOS], [EOS]),
    "slow": (ByT5Tokenizer, [], [1]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_documents_and_prompts_begin_and_do_not_end(name: str) -> None:
    make, before, behind = TOKENIZERS[name]
    tokenizer, text = make(), "w3 w7 a w9 a"
    plain = plain_ids(tokenizer, text)
    assert added_ids(tokenizer) == (before, behind)
    assert tokenizer(text)["input_ids"] == before + plain + behind
    assert begun_ids(tokenizer, [text, "", "w1"])[:2] == [before + plain, before]
    assert begun_ids(tokenizer, []) == []
    for end, last in ((None, []), (9, [9])):
        assert [row.tolist() for row in encode(tokenizer, [text], end)] == [before + plain + last]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_ends_where_its_text_ends(name: str) -> None:
    make, before, behind = TOKENIZERS[name]
    tokenizer, task = make(), replace(builtin_tasks()["passkey"], prompt="{{context}} {{input}}")
    row = {"context": " ".join(WORDS * 9), "input": "w5"}
    whole = Prompter(tokenizer, 1 << 20).encode(task, row).ids.tolist()
    assert whole == before + plain_ids(tokenizer, task.render(row))
    cut = Prompter(tokenizer, 300).encode(task, row)
    assert cut.truncated and cut.ids.tolist()[:10] == whole[:10] and cut.ids.tolist()[-10:] == whole[-10:]


def test_a_template_writes_what_begins_a_conversation() -> None:
    """The tokenizer's own bos is not added to it, in prompts as in training."""
    tokenizer = words("<s> $A </s>")
    tokenizer.chat_template = "<s> {% for m in messages %}w1 {{ m.content }} </s> {% endfor %}"
    chat = [{"role": "user", "content": "w2"}]
    expected = [BOS, *plain_ids(tokenizer, "w1 w2"), EOS]
    assert encode(tokenizer, [as_text(chat)], None)[0].tolist() == expected
    task = builtin_tasks()["passkey"]
    ids = Prompter(tokenizer, 2048, chat=True).encode(task, {"context": "w3", "input": "w4"}).ids.tolist()
    assert ids[0] == BOS and ids[-1] == EOS and BOS not in ids[1:] and EOS not in ids[:-1]


def test_a_document_may_end_as_another_is_ended() -> None:
    """A text's own last word is not taken for what the tokenizer appends."""
    tokenizer = words(None, eos_token="<unk>")
    assert encode(tokenizer, ["w1 never-seen"], None)[0].tolist() == [*plain_ids(tokenizer, "w1"), UNK]


def test_tokens_that_a_model_lacks_are_named_with_the_sizes() -> None:
    tokenizer, config = words(None), LlamaConfig(vocab_size=50)
    check_ids("text", [[49], torch.tensor([[1, 2]]), []], tokenizer, config)
    with pytest.raises(ValueError, match=r"text: token 50 \('w45'\) .* the 50 that the model embeds .*has 105\)"):
        check_ids("text", [[1], torch.tensor([[50, 2]])], tokenizer, config)
    check_ids("text", [[10**6]], tokenizer, None)


def with_model(config: Config, embedded: int) -> Config:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=embedded, **sizes)).save_pretrained(config.model.path)
    config.calibration.tokens, config.calibration.sequence_length = 320, 32
    config.launch.device = "cpu"
    return config


@pytest.mark.parametrize("end", ["none", "eos"])
def test_no_text_with_them_is_sampled_or_calibrated_on(tmp_path: Path, end: str) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", documents(600))
    config = make_config(tmp_path, {"a": local(texts)}, document_end=DocumentEnd(end))
    with_model(config, 150)
    config.mla.rope_dim, config.mla.kv_lora_rank = 4, 4
    with pytest.raises(ValueError, match=r"token \d+ .*not among the 150 that the model embeds"):
        sample(config)
    for streamed in ("off", "on"):
        config.launch.streamed = type(config.launch.streamed)(streamed)
        with pytest.raises(ValueError, match=r"data.*: token \d+ .*not among the 150 that the model embeds"):
            run_convert.__wrapped__(config)  # type: ignore[attr-defined]


def test_no_perplexity_is_measured_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither along a training nor by position; the option that holds them is named."""
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", documents(9, shortest=70)))})
    folder = Path(with_model(config, 150).model.path)
    file = tmp_path / "text.txt"
    file.write_text("w1 w2 w180 " * 99)
    config.eval.perplexity_text, config.eval.perplexity_sequence_length = str(file), 32
    with pytest.raises(ValueError, match=r"eval.perplexity_text=.*text.txt: token 181 \('w180'\)"):
        text_rows(config, folder)
    words = [f"original={folder}", "--files", str(tmp_path / "a.jsonl"), "--length", "64", "--documents", "2"]
    monkeypatch.setattr(sys, "argv", ["positions", *words, "--output", str(tmp_path / "found")])
    with pytest.raises(SystemExit):
        positions.main()
    assert re.search(r"error: --files for .*model: token \d+ ", capsys.readouterr().err)


def test_rows_of_an_embedding_that_no_token_names_do_no_harm(tmp_path: Path) -> None:
    """Embeddings are often padded to a round number."""
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", documents(600)))})
    sample(with_model(config, 256))


WRONG = {"outside": 202, "none": -1}


@pytest.mark.parametrize("pad", WRONG)
def test_a_model_speaks_whatever_pads_its_rows(tmp_path: Path, pad: str) -> None:
    """The same words with a pad token that the model does not embed, and with none, as with its own."""
    said = {}
    for own in (True, False):
        config = chat_model(tmp_path / str(own))
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        if own or pad == "outside":
            tokenizer.add_special_tokens({"pad_token": "<eos>" if own else "[PAD]"})
        tokenizer.save_pretrained(config.model.path)
        file = Path(config.model.path) / "generation_config.json"
        if not own:
            file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": WRONG[pad]}))
        converse(config)
        said[own] = [file.read_text() for file in sorted((tmp_path / str(own)).rglob("conversations*.jsonl"))]
    assert said[True] and said[True] == said[False]
