"""Decoding under whatever may stand around an up-projection: only a layer that is its weight alone is absorbed."""

from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import StaticCache

from mha2mla import QuantizedLatentCache
from mha2mla.families import latent_layers
from mha2mla.modeling.attention_mla import MLAAttention
from tests.mha2mla.test_decode import TOLERANCE, converted, step_by_step
from tests.tiny import relative, tokens

MASK = torch.ones(2, 20, dtype=torch.long)
MASK[0, :5] = 0
TENFOLD = 10.0


class Coded(torch.Tensor):
    """A weight as quantisation libraries keep it, in place of an ordinary one: it can be multiplied and nothing else.

    Its numbers are codes, a tenth of what they stand for.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            states, weight, *bias = args
            with torch._C.DisableTorchFunctionSubclass():
                return nn.functional.linear(states, weight.as_subclass(torch.Tensor) * TENFOLD, *bias)
        if func.__name__ in ("view", "reshape", "split", "matmul", "einsum"):
            raise NotImplementedError(f"{func.__name__} of codes")
        return super().__torch_function__(func, types, args, kwargs or {})


class Doubled(nn.Linear):
    """A layer of a library that derives its own from nn.Linear."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


def ups(model: torch.nn.Module) -> list[nn.Linear]:
    return [layer.kv_b_proj for _, layer in latent_layers(model)]


def coded_weights(model: Any) -> None:
    for up in ups(model):
        up.weight = nn.Parameter((up.weight.detach() / TENFOLD).as_subclass(Coded), requires_grad=False)


def other_class(model: Any) -> None:
    for up in ups(model):
        up.__class__ = Doubled


def parametrized(model: Any) -> None:
    for up in ups(model):
        weight_norm(up)
        up.parametrizations.weight.original0.data *= 2


def hooked(model: Any) -> None:
    for up in ups(model):
        up.register_forward_hook(lambda layer, inputs, output: 2 * output)


def hooked_before(model: Any) -> None:
    for up in ups(model):
        up.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))


def replaced_forward(model: Any) -> None:
    for up in ups(model):
        up.forward = lambda states, call=up.forward: 2 * call(states)


def offloaded(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def adapted(model: Any) -> Any:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "attn" in name]
    options = peft.LoraConfig(target_modules=names, init_lora_weights=False)
    return peft.get_peft_model(model, options).base_model.model


SAME = (coded_weights, offloaded)  # those that change how a weight is kept and not what it is
WRAPPERS = (*SAME, other_class, parametrized, hooked, hooked_before, replaced_forward, adapted)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    positions = (MASK.cumsum(-1) - 1).clamp_min(0)
    found: torch.Tensor = model(ids, attention_mask=MASK, position_ids=positions, use_cache=False).logits
    return found[MASK.bool()]


def check_decoding(model: Any, ids: torch.Tensor) -> None:
    """Steps through both caches, and generation, against the model's own forward."""
    for kind in ("dynamic", "static"):
        got = step_by_step(model, ids, MASK, kind, chunk=4)[MASK.bool()]
        assert relative(got, logits(model, ids)) < TOLERANCE
    options = {"attention_mask": MASK, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    said = model.generate(input_ids=ids, **options)
    kept = QuantizedLatentCache(model.config, 8, 8, residual_length=64)
    assert torch.equal(said, model.generate(input_ids=ids, **options, past_key_values=kept))
    assert torch.equal(said, model.generate(input_ids=ids, **options, use_cache=False))


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoding_calls_what_is_more_than_its_weight(family: str, wrap: Callable[[Any], Any]) -> None:
    ids = tokens(2, 20)
    model: Any = converted(family)
    plain = logits(model, ids)
    assert all(layer.absorbs(1) for _, layer in latent_layers(model))
    model = wrap(model) or model
    assert not any(layer.absorbs(1) for layer in model.modules() if isinstance(layer, MLAAttention))
    assert (relative(logits(model, ids), plain) < TOLERANCE) == (wrap in SAME)
    check_decoding(model, ids)


def test_torchao_decodes() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, ids = converted(), tokens(2, 20)
    plain = logits(model, ids)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert 0 < relative(logits(model, ids), plain) < 0.3
    check_decoding(model, ids)


@torch.no_grad()
def test_a_compiled_attention_decodes() -> None:
    """The compiler traces the question whether to absorb, too, without a break in its graph."""
    model, ids = converted(), tokens(2, 20)
    expected, cache = model(ids, use_cache=False).logits[:, -1], StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :-1], past_key_values=cache)
    for _, layer in latent_layers(model):
        layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
    got = model(ids[:, -1:], past_key_values=cache).logits[:, 0]
    assert relative(got, expected) < TOLERANCE
