"""Decoding through the latent cache equals one full forward at every position, and the cache is as small as claimed."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mha2mla import ConversionOptions, cache_bytes, convert
from mha2mla.families import geometry_of
from mha2mla.modeling.attention_mla import MLAAttention, score_bias
from tests.tiny import KV_HEADS, VARIANTS, relative, tiny_model, tokens

TOLERANCE = 1e-5  # float32; measured 1e-7 to 2e-6
RANK, LAYERS = 10, 2


def converted(family: str = "llama", heads: str = "gqa", **changes: object) -> torch.nn.Module:
    model = tiny_model(family, KV_HEADS[heads], **changes)
    rope = min(4 * KV_HEADS[heads], geometry_of(model.config).rotary_size)
    return convert(model, ConversionOptions(rope_dim=rope, kv_lora_rank=RANK))[0]


def cache_of(kind: str, model: torch.nn.Module) -> DynamicCache | StaticCache:
    return (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    )


@torch.no_grad()
def step_by_step(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, kind: str, chunk: int) -> torch.Tensor:
    """Logits of ids fed through the cache: a prompt in chunks, then one token at a time."""
    cache, logits, start = cache_of(kind, model), [], 0
    while start < ids.shape[1]:
        stop = start + chunk if start + chunk <= 12 else start + 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        step = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(step.logits)
        start = stop
    return torch.cat(logits, dim=1)


@pytest.mark.capability("absorbed decode")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("family", "heads"), VARIANTS)
def test_decode_equals_full_forward(family: str, heads: str, kind: str, padded: bool) -> None:
    model, ids = converted(family, heads), tokens(2, 20)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    got = step_by_step(model, ids, mask, kind, chunk=4)
    keep = mask.bool()
    assert relative(got[keep], expected[keep]) < TOLERANCE
    # Control: the same steps without the mask see the padding and differ.
    if padded:
        blind = step_by_step(model, ids, torch.ones_like(ids), kind, chunk=4)
        assert relative(blind[0, 5:], expected[0, 5:]) > 1e-2


def test_sliding_window_is_kept() -> None:
    model, ids = converted("mistral", sliding_window=6), tokens(2, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.config.sliding_window = None
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        unlimited = model(ids, use_cache=False).logits
    model = converted("mistral", sliding_window=6)
    got = step_by_step(model, ids, torch.ones_like(ids), "dynamic", chunk=4)
    assert relative(got, expected) < TOLERANCE
    assert relative(unlimited, expected) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_forwards_are_one_function(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded and absorbed attention agree at any number of queries, and the shape decides which one runs."""
    model, ids = converted(), tokens(2, 20)
    model.set_attn_implementation(implementation)
    ran: list[int] = []
    absorbed = MLAAttention.attend_latent
    monkeypatch.setattr(
        MLAAttention, "attend_latent", lambda self, q, *rest: (ran.append(q.shape[2]), absorbed(self, q, *rest))[1]
    )
    results = {}
    for always in (True, False):
        monkeypatch.setattr(MLAAttention, "absorbs", lambda self, queries, always=always: always)
        results[always] = step_by_step(model, ids, torch.ones_like(ids), "dynamic", chunk=6)
        assert bool(ran) == always
        ran.clear()
    assert relative(results[True], results[False]) < TOLERANCE
    monkeypatch.undo()
    attention = model.model.layers[0].self_attn
    assert attention.absorbs(1) and not attention.absorbs(10_000)


@pytest.mark.parametrize("heads", KV_HEADS)
def test_cache_holds_exactly_r_plus_rope_numbers(heads: str) -> None:
    model, ids = converted(heads=heads), tokens(2, 20)
    original = tiny_model(kv_heads=KV_HEADS[heads])
    with torch.no_grad():
        ours = model(ids, use_cache=True).past_key_values
        theirs = original(ids, use_cache=True).past_key_values
    numbers = 4 * ids.numel() * LAYERS
    assert cache_bytes(ours) == (RANK + 4 * KV_HEADS[heads]) * numbers
    assert cache_bytes(theirs) == 2 * 8 * KV_HEADS[heads] * numbers


def test_cache_bytes_counts_what_is_kept_alive() -> None:
    """A cropped cache that still holds the longer tensor is not smaller; one that was copied is."""
    model, ids = converted(), tokens(1, 16)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    whole = cache_bytes(cache)
    cache.crop(-8)
    assert cache_bytes(cache) == whole
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert cache_bytes(cache) == whole // 2


GENERATION = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", GENERATION)
def test_generate_equals_search_without_a_cache(way: str) -> None:
    model = converted()
    ids = tokens(1 if way == "prompt lookup" else 2, 12)
    mask = torch.ones_like(ids)
    if len(ids) == 2:
        ids[1, :4], mask[1, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    beams = {"num_beams": 3} if way == "beams" else {}
    expected = model.generate(ids, **options, **beams, use_cache=False)
    assert torch.equal(model.generate(ids, **options, **GENERATION[way]), expected)


def test_adapter_on_the_up_projection_is_not_lost_in_decoding() -> None:
    """Absorbing reads the up-projection's weight; what peft adds to it must count all the same."""
    peft = pytest.importorskip("peft")
    model, ids = converted(), tokens(2, 20)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False))
    with torch.no_grad():
        expected = adapted(ids, use_cache=False).logits
    assert relative(expected, plain) > 1e-2
    got = step_by_step(adapted.base_model.model, ids, torch.ones_like(ids), "dynamic", chunk=4)
    assert relative(got, expected) < TOLERANCE


def test_gradients_do_not_depend_on_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forwards can train: the same gradients for the up-projection, which the absorbed one uses transposed."""
    gradients = []
    for always in (True, False):
        monkeypatch.setattr(MLAAttention, "absorbs", lambda self, queries, always=always: always)
        model = converted()
        model(tokens(), use_cache=True).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.kv_b_proj.weight.grad)
    assert relative(gradients[0], gradients[1]) < TOLERANCE


def test_what_a_kernel_reads_starts_where_cuda_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that begin amid 16 bytes, behind those of a key, gave wrong logits in bfloat16 on CUDA, or an error."""
    model = converted(heads="gqa", hidden_size=64).to(torch.bfloat16)
    assert model.config.qk_nope_head_dim * 2 % 16
    seen = []

    def record(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest, **options):
        seen.extend([query, key, value])
        return sdpa(module, query, key, value, *rest, **options)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    with torch.no_grad():
        model(tokens(), use_cache=False)
    assert len(seen) == 3 * LAYERS
    for states in seen:
        assert states.data_ptr() % 16 == 0
        assert all(stride * states.element_size() % 16 == 0 for stride in states.stride()[1:-1])


def test_a_query_that_sees_nothing_stays_a_number_in_float16() -> None:
    """As rows of padding are; added to a score, the least number of the dtype would be minus infinity."""
    for mask in (torch.zeros(2, 1, 3, 7, dtype=torch.bool), torch.full((2, 1, 3, 7), torch.finfo(torch.float32).min)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            scores = torch.full((2, 4, 3, 7), -30.0, dtype=dtype) + score_bias(mask, dtype)
            assert scores.isfinite().all() and scores.softmax(-1).isfinite().all()
    seen = torch.tensor([[[[True, False]]]])
    weights = (torch.zeros(1, 1, 1, 2, dtype=torch.float16) + score_bias(seen, torch.float16)).softmax(-1)
    assert weights.flatten().tolist() == [1, 0]
