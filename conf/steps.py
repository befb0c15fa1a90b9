"""What a long generation tells while it runs: every decoded token."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria


class EveryStep(StoppingCriteria):
    """Stops nothing; `on_step` is told how many tokens were generated, `prompt` being the prompts' length."""

    def __init__(self, on_step: Callable[[int], None], prompt: int):
        self.on_step, self.prompt = on_step, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.on_step(input_ids.shape[1] - self.prompt)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
