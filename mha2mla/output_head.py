"""Whether a model's logits are its output layer applied to its last hidden states, so that they can be made for a
few tokens at a time."""

from typing import Any

# Settings of families that do something to the logits after the output layer; their own forward has to be used.
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def ends_with_head(model: Any) -> bool:
    return not any(getattr(model.config, name, None) for name in AFTER_HEAD)
