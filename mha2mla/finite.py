"""Numbers that are not finite, found where they arise: nothing that is made or measured of such a model means anything.

The usual cause is float16, which ends at 65,504: models trained in bfloat16 go beyond it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor

LARGEST = 1e18  # of a weight: its square is still far within float32
HALF = "float16 ends at 65,504: take bfloat16 or float32 (model.dtype=bfloat16, in memory: launch.streamed=off)"
BROKEN = "the checkpoint is broken, or was trained with another configuration: get it again"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are; takes no memory of its size."""
    return largest(tensor) < math.inf


def largest(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor; infinity if it holds NaN."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return 0.0
    found = float(torch.stack(tensor.detach().aminmax()).abs().max())  # both are NaN if one number is
    return math.inf if math.isnan(found) else found


def check_weights(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """ValueError that names the weights that are not finite, or whose products no float32 would hold."""
    broken = {name: tensor.dtype for name, tensor in named if not largest(tensor) < LARGEST}
    if broken:
        names = ", ".join(list(broken)[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise ValueError(
            f"the original's weights hold NaN, infinity or numbers beyond {LARGEST:.0e} in {names}; "
            + remedy(*broken.values())
        )


def check_activations(numbers: torch.Tensor, whose: str, model: Any, run: Callable[[], Any], name: str = "") -> None:
    """ValueError unless `numbers` are finite, which `run` made with `model`: it names the module that they come from.

    whose: as the message begins; name: of `model` among the modules that it tells of.
    """
    if not is_finite(numbers):
        place = ".".join(filter(None, (name, first_not_finite(model, run)))) or type(model).__name__
        dtype = next(model.parameters()).dtype
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{whose} activations are not finite in {kind}, first in the output of {place}; {remedy(dtype)}"
        )


def whose_activations(config: Any) -> str:
    return "the converted model's" if hasattr(config, "kv_lora_rank") else "the original's own"


def remedy(*dtypes: torch.dtype) -> str:
    return HALF if torch.float16 in dtypes else BROKEN


@torch.no_grad()
def first_not_finite(model: nn.Module, run: Callable[[], Any]) -> str:
    """Name of the first module that gives numbers that are not finite while `run` runs; empty if it is all of them."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if not found and not all(map(is_finite, tensors_in(output))):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """All tensors of a module's output."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors_in(part)


class FiniteScores(LogitsProcessor):
    """Ends generation with a ValueError where logits are not finite: greedily they would mean the first token of the
    vocabulary. Minus infinity, which others set, is a score as long as there is another."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not bool(scores.amax(-1).isfinite().all()):
            kind = str(scores.dtype).removeprefix("torch.")
            raise ValueError(
                f"the model's logits are not finite after {input_ids.shape[1]} tokens (scores in {kind}): it can say "
                "nothing; run it in bfloat16 or float32, or get its checkpoint again"
            )
        return scores
