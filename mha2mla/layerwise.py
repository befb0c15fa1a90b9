"""A decoder one layer at a time, whatever its family puts around the attention (norms before and after, factors on
residuals, parallel branches, experts): the layer itself runs, and hooks read what goes into its attention and out.

Shapes: B batch, S tokens from position 0 without padding, d hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mha2mla.families import attention_layers
from mha2mla.finite import check_activations, whose_activations
from mha2mla.target import rotate_positions, slides
from mha2mla.token_ids import known_ids


class Passed(NamedTuple):
    """One layer on states [B, S, d]: what its attention got and gave, and the states after the layer."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    states: torch.Tensor


class Reached(Exception):
    """Ends a forward pass at the place that was looked for."""


def states_into(module: Any, run: Callable[[], Any]) -> torch.Tensor:
    """The states that `run` hands to a module; it goes no further."""
    found: list[torch.Tensor] = []

    def stop(_module: Any, inputs: Any, named: Any) -> None:
        found.append(inputs[0] if inputs else named["hidden_states"])
        raise Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def embed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the first layer of a decoder gets for input_ids [B, S]; ValueError for tokens that it does not embed."""
    return states_into(model.layers[0], lambda: model(input_ids=known_ids(model, ids), use_cache=False))


def surroundings(model: Any, index: int, states: torch.Tensor) -> dict[str, Any]:
    """What a decoder gives layer `index` beside its states."""
    config = model.config
    positions = torch.arange(states.shape[1], device=states.device)[None]
    mask = create_sliding_window_causal_mask if slides(config, index) else create_causal_mask
    return {
        "attention_mask": mask(
            config=config, inputs_embeds=states, attention_mask=None, past_key_values=None, position_ids=positions
        ),
        "position_ids": positions,
        "position_embeddings": rotate_positions(model, states, index),
    }


def pass_layer(model: Any, index: int, states: torch.Tensor) -> Passed:
    """Run layer `index` of a decoder on states [B, S, d]; ValueError where they are not finite behind it."""
    seen: list[torch.Tensor] = []

    def hook(_attention: Any, inputs: Any, named: Any, output: Any) -> None:
        seen.extend((inputs[0] if inputs else named["hidden_states"], output[0]))

    layer, around = model.layers[index], surroundings(model, index, states)
    handle = attention_layers(model)[index].register_forward_hook(hook, with_kwargs=True)
    try:
        after = layer(states, **around)
    finally:
        handle.remove()
    after = after[0] if isinstance(after, tuple) else after
    run = partial(layer, states, **around)
    check_activations(after, whose_activations(model.config), layer, run, f"layers.{index}")
    return Passed(seen[0], seen[1], after)


def attention_input(model: Any, index: int, states: torch.Tensor) -> torch.Tensor:
    """What the attention of layer `index` gets when the layer gets states [B, S, d]."""
    around = surroundings(model, index, states)
    return states_into(attention_layers(model)[index], lambda: model.layers[index](states, **around))
