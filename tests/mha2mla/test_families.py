"""The ladder's upper rungs for every family: what makes it different counts, its cache, its checkpoint, its healing.

Equality at full budget and of decoding are in test_equivalence.py, test_methods.py and test_decode.py.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mha2mla import (
    ConversionOptions,
    QuantizedLatentCache,
    cache_bytes,
    calibrate_ranges,
    collect_statistics,
    convert,
    reconstruct,
)
from mha2mla.compare import compare
from mha2mla.families import FAMILIES as TABLE
from mha2mla.families import attention_layers, geometry_of, latent_layers
from mha2mla.modeling.attention_normed_mla import HeadNorm, NormedMLAAttention
from tests.tiny import FAMILIES, KV_HEADS, VARIANTS, preset, relative, tiny_model, tokens

TOLERANCE = 1e-5
BEST = preset("best")


def half(family: str, heads: str = "gqa", **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """An original and its conversion to half the cache."""
    model = tiny_model(family, KV_HEADS[heads])
    statistics = collect_statistics(model, tokens(8, 24, seed=1).split(4))
    return model, convert(model, ConversionOptions(**{"reduction": 0.5, **BEST, **options}), statistics)[0]


def full(family: str, heads: str = "gqa") -> tuple[torch.nn.Module, torch.nn.Module]:
    model = tiny_model(family, KV_HEADS[heads])
    geometry = geometry_of(model.config)
    rope = geometry.rotary_size
    return model, convert(model, ConversionOptions(rope_dim=rope, kv_lora_rank=geometry.full_rank(rope)))[0]


@torch.no_grad()
def logits(model: torch.nn.Module, **inputs: object) -> torch.Tensor:
    return model(tokens(), use_cache=False, **inputs).logits


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert set(TABLE) == set(FAMILIES)


@pytest.mark.capability("checkpoint")
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_loads_bit_for_bit(family: str, tmp_path: Path) -> None:
    _, converted = half(family)
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(converted) is TABLE[family].causal_lm_class
    assert torch.equal(logits(loaded), logits(converted))


@pytest.mark.capability("generate")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_left_padding_equals_search_without_a_cache(family: str, cache: str) -> None:
    _, converted = half(family)
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = converted.generate(ids, **options, use_cache=False)
    static = {"cache_implementation": "static"} if cache == "static" else {}
    assert torch.equal(converted.generate(ids, **options, **static), expected)


@pytest.mark.parametrize(("family", "heads"), VARIANTS)
def test_cache_holds_what_the_report_says(family: str, heads: str) -> None:
    model = tiny_model(family, KV_HEADS[heads])
    converted, report = convert(model, ConversionOptions(reduction=0.5))
    ids = tokens(2, 6)  # within the windows
    with torch.no_grad():
        ours, theirs = (each(ids, use_cache=True).past_key_values for each in (converted, model))
    each = 4 * ids.numel() * model.config.num_hidden_layers
    assert cache_bytes(ours) == report.cache_size * each
    assert cache_bytes(theirs) == report.original_cache_size * each
    assert report.cache_size <= report.original_cache_size / 2


@pytest.mark.capability("quantised cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_hardly_change_decoding_and_two_bits_do(family: str) -> None:
    _, converted = half(family, reduction=None, kv_lora_rank=12)
    ids, errors = tokens(2, 40), {}
    with torch.no_grad():
        whole = converted(ids, use_cache=False).logits
        for bits in (8, 2):
            cache = QuantizedLatentCache(converted.config, bits, 8, residual_length=4, sink_length=1)
            steps = [converted(ids[:, :20], past_key_values=cache).logits]
            steps += [converted(ids[:, at : at + 1], past_key_values=cache).logits for at in range(20, 40)]
            errors[bits] = relative(torch.cat(steps, 1)[:, 20:], whole[:, 20:])
    assert errors[8] < 0.05 < errors[2]


@pytest.mark.capability("healing")
@pytest.mark.parametrize("family", FAMILIES)
def test_healing_lowers_the_loss(family: str) -> None:
    _, converted = half(family)
    ids = tokens(8, 24, seed=1)
    trained = [parameter for _, layer in latent_layers(converted) for parameter in layer.parameters()]
    optimizer, losses = torch.optim.Adam(trained, lr=3e-3), []
    for _ in range(12):
        loss = converted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.02, losses
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_brings_every_layer_nearer(family: str) -> None:
    """On sequences that it was not fitted on: layers by 6 % and more, the model's divergence by 3 % and more."""
    model, converted = half(family)
    text, heldout = tokens(64, 24, seed=1).split(4), [tokens(8, 24, seed=5)]
    closed = compare(model, converted, heldout).kl_divergence
    before = [fit.before for fit in reconstruct(model, converted, text, steps=0)]
    fits = reconstruct(model, converted, text, steps=60, learning_rate=1e-2)
    assert all(fit.after < 0.97 * fit.before for fit in fits) and abs(fits[0].before / before[0] - 1) < 1e-5
    assert compare(model, converted, heldout).kl_divergence < 0.99 * closed
    # Layer by layer is the same decoder: with nothing lost nothing is there to learn, whatever surrounds attention.
    assert max(fit.before for fit in reconstruct(*full(family), text, steps=0)) < 1e-9


PECULIARITIES = {
    "softcap": ("gemma2", lambda layer: setattr(layer, "softcap", None)),
    "window": ("gemma2", lambda layer: setattr(layer.config, "sliding_window", 1000)),
    "factor on scores": ("granite", lambda layer: setattr(layer, "scaling", layer.scaling * 1.5)),
    "layers without rotation": ("smollm3", lambda layer: setattr(layer, "rotates", True)),
    "key scales": ("qwen3", lambda layer: layer.key_size.mul_(1.5)),
    "norm over all heads": ("olmo2", lambda layer: setattr(layer.k_norm, "joint", False)),
}


@pytest.mark.parametrize("name", PECULIARITIES)
def test_a_family_s_peculiarity_matters(name: str) -> None:
    """Control for the equalities: without it the logits are others."""
    family, spoil = PECULIARITIES[name]
    model, converted = full(family, "mha" if family == "olmo2" else "gqa")
    assert relative(logits(converted), logits(model)) < TOLERANCE
    if name == "norm over all heads":
        with pytest.raises(
            RuntimeError, match="size|shape"
        ):  # as many scales as heads do not fit where one is expected
            spoil_all(converted, spoil)
            logits(converted)
        return
    if name == "key scales":  # they stand at what does not rotate
        _, converted = half(family)
        expected = logits(converted)
    else:
        expected = logits(model)
    spoil_all(converted, spoil)
    assert relative(logits(converted), expected) > 1e-3


def spoil_all(model: torch.nn.Module, spoil: object) -> None:
    for _, layer in latent_layers(model):
        spoil(layer)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe"])
def test_a_norm_after_rotation_is_another_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the norm's weights differ within a pair, so norm and rotation do not commute."""
    model, converted = full(family)
    assert relative(logits(converted), logits(model)) < TOLERANCE
    own = NormedMLAAttention.project_latents

    def rotated_first(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        weight = self.k_norm.weight.view(self.num_key_value_heads, -1)
        plain = HeadNorm(*weight.shape, self.k_norm.joint, self.k_norm.eps)
        k_norm, self.k_norm = self.k_norm, plain
        latent, k_rot = own(self, hidden_states, cos, sin)  # normed and rotated without the weight
        self.k_norm = k_norm
        pairs = weight.unflatten(-1, (2, -1))[:, :, self.rope_pair_index[0]]
        after = torch.einsum("gcp,pg->cp", pairs, self.rope_mixing).flatten()
        return latent, torch.cat((k_rot[..., : self.rope_dim] * after, k_rot[..., self.rope_dim :]), -1)

    monkeypatch.setattr(NormedMLAAttention, "project_latents", rotated_first)
    assert relative(logits(converted), logits(model)) > 1e-2


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_statistics_of_normed_layers_are_those_of_their_queries_and_keys(family: str) -> None:
    model, ids = tiny_model(family), tokens(4, 12)
    layer, geometry, seen = attention_layers(model)[0], geometry_of(model.config), {}

    def keep(name: str):
        def hook(_norm: object, _inputs: object, output: torch.Tensor) -> None:
            seen[name] = output.reshape(48, -1, geometry.head_dim)

        return hook

    for name in ("q_norm", "k_norm"):
        getattr(layer, name).register_forward_hook(keep(name))
    found = collect_statistics(model, [ids]).layers[0]
    query, key = seen["q_norm"].detach(), seen["k_norm"].detach()
    assert relative(found.query_moment, torch.einsum("thi,thj->hij", query, query) / 48) < TOLERANCE
    first, second = key.unflatten(-1, (2, -1)).unbind(2)
    expected = (torch.einsum("tgf,thf->fgh", first, first) + torch.einsum("tgf,thf->fgh", second, second)) / 48
    assert relative(found.key_moment, expected) < TOLERANCE
    assert relative(found.key_norm, (first.square() + second.square()).sqrt().mean(0)) < TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_window_layers_stay_as_they_are_by_choice(family: str, tmp_path: Path) -> None:
    model, converted = half(family, layers="full-attention")
    kept, changed = attention_layers(converted)
    assert type(kept) is type(attention_layers(model)[0]) and converted.config.latent_layers == [1]
    reconstruct(model, converted, tokens(8, 24).split(4), steps=2)
    assert all(torch.equal(tensor, dict(attention_layers(model)[0].named_parameters())[name])
               for name, tensor in kept.named_parameters())  # fmt: skip
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(converted))
    ids = tokens(2, 20)
    expected = converted.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(converted.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False), expected)
    cache = QuantizedLatentCache(converted.config, 8, group_size=2)
    coded = converted.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(coded, expected) and cache.layers[0].keys.shape[2] == 7
    with pytest.raises(ValueError, match="every layer of this model has a sliding window"):
        convert(tiny_model("mistral", sliding_window=6), ConversionOptions(layers="full-attention"))
    with pytest.raises(ValueError, match="layers='some' is unknown"):
        convert(model, ConversionOptions(layers="some"))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_runs_every_way(family: str) -> None:
    """Prompts, decoding and coded caches; OLMo 2 rotates in float32, which must not leak into the cache."""
    model, converted = half(family)
    expected, converted = logits(converted), converted.bfloat16()
    assert relative(logits(converted).float(), expected) < 0.1
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for extra in (
        {},
        {"cache_implementation": "static"},
        {"past_key_values": QuantizedLatentCache(converted.config, 8)},
    ):
        assert converted.generate(ids, **options, **extra).shape == (2, 16)
    with torch.no_grad():
        cache = converted(ids, use_cache=True).past_key_values
    assert {states.dtype for layer in cache.layers for states in (layer.keys, layer.values)} == {torch.bfloat16}
    assert reconstruct(model.bfloat16(), converted, [ids], steps=1)


@pytest.mark.parametrize("family", ["olmo2", "qwen3"])
def test_scales_of_normed_keys_stay_whole_in_a_coded_cache(family: str) -> None:
    """An odd number of them would leave the rotated key no groups, and few bits would ruin every key."""
    _, converted = half(family, reduction=None, rope_dim=8, kv_lora_rank=12)
    cache = QuantizedLatentCache(converted.config, 4, 4, residual_length=0, sink_length=0)
    ids, scales = tokens(2, 20), converted.config.key_scales
    with torch.no_grad():
        converted(ids, past_key_values=cache)
        whole = converted(ids, use_cache=True).past_key_values
    layer = cache.layers[0]
    assert torch.equal(layer.states(1).dense()[..., 8:], whole.layers[0].values[..., 8:])
    assert not torch.equal(layer.states(1).dense()[..., :8], whole.layers[0].values[..., :8])
    rows = torch.randn(2, 3, 8 + scales)
    assert relative(layer.states(1).dot(rows), rows @ layer.states(1).dense()[:, 0].mT) < TOLERANCE
    ranges = calibrate_ranges(converted, [ids], 4, 4)
    fixed = QuantizedLatentCache(converted.config, 4, 4, ranges=ranges)
    assert converted.generate(ids, max_new_tokens=3, min_new_tokens=3, past_key_values=fixed).shape[1] == 23


def test_attentions_of_all_layers_are_told_where_some_stay_as_they_are() -> None:
    model, converted = half("gemma2", layers="full-attention")
    with torch.no_grad():
        found = [each(tokens(), output_attentions=True, use_cache=False).attentions for each in (model, converted)]
    assert [len(each) for each in found] == [2, 2] and relative(found[1][0], found[0][0]) < TOLERANCE
