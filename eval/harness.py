"""lm-eval's runner of transformers models, which reads contexts as everything here does (data/tokens.py)."""

from collections import defaultdict
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from conf.progress import counted
from data.tokens import added_ids, begun_ids, check_ids, plain_ids
from eval.generate import NewCache


class Harness(HFLM):
    """HFLM whose contexts do not end with what the tokenizer appends.

    HFLM takes an answer's tokens to be those behind its question's: an eos behind both would take the place of one.
    With `new_cache` every forward goes through a fresh cache.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, new_cache: NewCache | None = None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.new_cache = new_cache
        self.ending = len(added_ids(tokenizer)[1])
        begin = tokenizer.bos_token or tokenizer.eos_token
        self.begin: tuple[str, ...] = (begin,) if begin else ()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        begun = string.startswith(self.begin)  # by itself, with bos spelled out
        plain = add_special_tokens is False or (add_special_tokens is None and begun)
        ids = plain_ids(self.tokenizer, string) if plain else begun_ids(self.tokenizer, [string], self.ending)[0]
        check_ids("benchmarks", [ids], self.tokenizer, self.config)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if self.new_cache is None:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.model(inps, past_key_values=self.new_cache(self.model), use_cache=True).logits

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        """Through a cache, batches of texts of one length: padding would be quantised together with what is real."""
        if self.new_cache is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, (_, context, answer) in enumerate(requests):
            by_length[min(len(context) + len(answer), self.max_length + 1)].append(place)
        found: list[Any] = [None] * len(requests)
        for length in counted(sorted(by_length, reverse=True), "benchmark", "lengths"):
            places = by_length[length]
            scores = super()._loglikelihood_tokens([requests[place] for place in places], True, override_bs)
            for place, score in zip(places, scores, strict=True):
                found[place] = score
        return found
