"""A converted model in the form that vLLM's Transformers backend serves with a latent cache
(modeling/attention_served_mla.py)."""

import copy
from typing import Any

import torch

from mha2mla.engines import cache_obstacles, refuse_half, whole_query
from mha2mla.families import attention_layers
from mha2mla.modeling.attention_served_mla import SHRINK
from mha2mla.target import tie_like


def obstacles(config: Any) -> list[str]:
    """What keeps a converted model's configuration from that form; empty if nothing does."""
    found = cache_obstacles(config)
    if getattr(config, "attn_logit_softcapping", None):
        found.append("caps on scores, which latent kernels do not have")
    if config.model_type == "gpt_neox_mla":
        found.append("layers that hand on their cache by another name (GPT-NeoX)")
    return found


@torch.no_grad()
def to_served(model: Any) -> Any:
    """The same function, dtype and class with `config.served=True`; it shares no attention weights with `model`, and
    has no cache format: engines keep the latent's numbers in bits of their own.

    Raises ValueError with everything that form cannot say.
    """
    refuse_half(model, "serving form")
    if found := obstacles(model.config):
        raise ValueError(f"no serving form of this {model.config.model_type} model: it has " + "; ".join(found))
    config = copy.deepcopy(model.config)
    config.served, config.q_lora_rank, config.cache_format = True, None, None
    state = {name: weight for name, weight in model.state_dict().items() if ".self_attn." not in name}
    prefix = f"{model.base_model_prefix}."
    for index, attention in enumerate(attention_layers(model)):
        for name, weight in attention_state(attention).items():
            state[f"{prefix}layers.{index}.self_attn.{name}"] = weight
    with torch.device("meta"):
        served = type(model)._from_config(config, dtype=model.dtype)
    served.base_model.rotary_emb = copy.deepcopy(model.base_model.rotary_emb)
    served.load_state_dict({name: w.detach().clone() for name, w in state.items()}, assign=True)
    tie_like(served, model)
    served.generation_config = model.generation_config
    return served.eval()


def attention_state(attention: Any) -> dict[str, torch.Tensor]:
    heads, groups, rank = attention.num_heads, attention.num_key_value_heads, attention.kv_lora_rank
    state = {name: weight for name, weight in attention.state_dict().items() if not name.startswith("cache_tables.")}
    if "q_a_proj.weight" in state:
        state["q_proj.weight"] = whole_query(attention).to(state.pop("q_b_proj.weight").dtype)
        del state["q_a_proj.weight"]
        if "q_b_proj.bias" in state:
            state["q_proj.bias"] = state.pop("q_b_proj.bias")
    for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        if name in state:
            state[name] = state[name].clone()
            state[name][:rank] *= SHRINK
    state["kv_a_layernorm.weight"] = torch.full((rank,), 1 / SHRINK).to(state["o_proj.weight"])
    up = state["kv_b_proj.weight"].view(groups, -1, rank)
    state["kv_b_proj.weight"] = up.repeat_interleave(heads // groups, 0).flatten(0, 1)
    return state
