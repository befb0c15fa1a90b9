"""The one way a model's weights are loaded: all of them, exactly those that the checkpoint holds, or refused.

transformers fills what a checkpoint lacks with random numbers, and leaves out what it does not know, with a warning
each. Either is another model than the one that was given.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mha2mla  # noqa: F401  registers the classes of converted models
from conf.errors import one_line
from conf.models import check_files
from mha2mla.shards import listed
from mha2mla.token_ids import without_negative_pad

AGAIN = "make it again with `make convert ARGS=force=true`"
NOT_OURS = "get that checkpoint again"
REPORT = {  # what transformers reports of loading, and what it means for the checkpoint
    "missing_keys": "lacks",
    "unexpected_keys": "holds besides its model",
    "mismatched_keys": "holds in another shape",
}


def load_model(
    path: Path | str,
    dtype: torch.dtype | str,
    remedy: str = AGAIN,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    model_class: Any = AutoModelForCausalLM,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The causal language model in a folder or on the hub, in mode of evaluation on `device`.

    dtype: `auto` keeps what the checkpoint is stored in. remedy: what to do about a checkpoint that is refused.
    gguf_file: the file of that name in the folder instead, dequantised.
    Raises ValueError where a weight is missing, not the model's or of another shape, and where a file is cut short.
    """
    place = Path(path).expanduser()
    if place.exists() and not gguf_file:
        check_files(str(path), place)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision or "main"}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that the report names them
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        model, report = model_class.from_pretrained(str(place) if place.is_dir() else str(path), **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{path} holds no complete checkpoint ({reason}); {remedy}") from error
    for kind, verb in REPORT.items():
        if names := sorted(str(each[0] if isinstance(each, tuple) else each) for each in report[kind]):
            raise ValueError(f"{path} {verb} {listed(names, 'weight')}; {remedy}")
    complete: PreTrainedModel = model
    without_negative_pad(complete.generation_config)
    return complete.to(device).eval()  # type: ignore[arg-type]
