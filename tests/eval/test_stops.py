"""Stop and pad tokens of a checkpoint, wherever it says them, and benchmarks with what tokenizers add."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from conf.checkpoint import load_model
from eval.generate import CacheReading, generate
from eval.harness import Harness
from eval.inputs import prepare, stops_of
from tests.eval.test_benchmarks import write_tiny
from tests.eval.test_generate import prompts
from tests.eval.tiny import compose_config, finish_before_evaluation, write_original

SIZE = 600  # tokens that the tiny model embeds
NAMES = {"pad": "<pad>", "eos": "</s>"}  # 0 and 2


def checkpoint(folder: Path, generation: dict[str, Any] | None, config: dict[str, Any], tokenizer: str) -> str:
    """The tiny checkpoint saying these settings; tokenizer: which of its tokens has a name, or `outside` for more."""
    write_original(folder)
    model = folder / "model"
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    settings = model / "generation_config.json"
    settings.unlink() if generation is None else settings.write_text(json.dumps(generation))
    words = AutoTokenizer.from_pretrained(model)
    words.pad_token = NAMES["pad"] if "pad" in tokenizer else None
    words.eos_token = NAMES["eos"] if "eos" in tokenizer else None
    if "outside" in tokenizer:
        words.add_special_tokens({"pad_token": "[PAD]", "eos_token": "[END]"})
    words.save_pretrained(model)
    return str(model)


NONE = {"eos_token_id": None, "pad_token_id": None}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str, list[int], int]] = {
    "all agree": ({"eos_token_id": 2, "pad_token_id": 0}, {}, "pad eos", [2], 0),
    "a list": ({"eos_token_id": [7, 9]}, NONE, "pad eos", [2, 7, 9], 0),
    "a list and no eos of the tokenizer's": ({"eos_token_id": [7, 9]}, NONE, "pad", [7, 9], 0),
    "no generation settings": (None, {"eos_token_id": [5, 6], "pad_token_id": 4}, "pad eos", [2, 5, 6], 4),
    "generation settings before the configuration": (
        {"eos_token_id": 5, "pad_token_id": 6},
        {"eos_token_id": 8, "pad_token_id": 9},
        "",
        [5],
        6,
    ),
    "generation settings that do not say": ({"do_sample": True}, {"eos_token_id": 8, "pad_token_id": 9}, "", [8], 9),
    "the tokenizer alone": (None, NONE, "pad eos", [2], 0),
    "no pad": ({"eos_token_id": 5}, NONE, "eos", [2, 5], 2),
    "a pad of -1": ({"eos_token_id": 5, "pad_token_id": -1}, {"pad_token_id": -1}, "", [5], 5),
    "nothing": (None, NONE, "", [], 0),
    "outside": ({"eos_token_id": [SIZE, 5], "pad_token_id": SIZE}, NONE, "outside", [5], 5),
    "all outside": ({"eos_token_id": SIZE + 9, "pad_token_id": SIZE}, NONE, "outside", [], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_stop_and_pad_tokens_are_the_models_own(tmp_path: Path, name: str) -> None:
    """And a batch padded with what was found gives what each prompt gives alone."""
    *said, ends, pad = CASES[name]
    folder = checkpoint(tmp_path, *said)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder, torch.float32).eval()
    stops = stops_of(tokenizer, folder, None)
    assert (stops.ends, stops.pad) == (ends, pad)
    chosen = prompts(9, 4)
    together = generate(model, tokenizer, chosen, 4, stops, CacheReading())
    assert together == [generate(model, tokenizer, [ids], 4, stops, CacheReading())[0] for ids in chosen]


def test_inputs_with_tokens_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    """Before any model is loaded, with the name of what holds them."""
    write_original(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    words.add_tokens(["pass"])
    words.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("pass " * 99)
    for overrides, message in (
        ((), r"task 'passkey': token 600 \('pass'\) .* the 600 that the model embeds \(the tokenizer has 601\)"),
        ((f"eval.perplexity_text={text}",), r"eval.perplexity_text=.*text.txt: token 600"),
    ):
        config = compose_config(tmp_path, *overrides)
        plan = finish_before_evaluation(config)
        with pytest.raises(ValueError, match=message):
            prepare(config, str(tmp_path / "model"), plan.sample.folder, "cpu")


@pytest.mark.parametrize("template", ["$A w0", "w1 $A w2 w0"])
def test_benchmarks_do_not_score_what_a_tokenizer_appends(tmp_path: Path, template: str) -> None:
    """An end behind question and answer would hide the answer's first token, and be scored in its place."""
    write_tiny(tmp_path)
    model, tokenizer = load_model(tmp_path, torch.float32).eval(), AutoTokenizer.from_pretrained(tmp_path)
    plain = Harness(model, tokenizer, 2)
    asked, answer = plain._encode_pair("w3 w9", " w12 w8 w2")
    assert (asked, answer) == ([3, 9], [12, 8, 2])
    special = [(f"w{number}", number) for number in range(3)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    before = [1] if template.startswith("w1") else []
    ending = Harness(model, tokenizer, 2)
    assert ending._encode_pair("w3 w9", " w12 w8 w2") == (before + asked, answer)
    assert ending.tok_encode("w3 w9", left_truncate_len=1) == [9]
    assert ending.tok_encode("w3", add_special_tokens=False) == [3]
    assert ending.tok_encode("w0 w3") == [0, 3]  # which begins by itself
