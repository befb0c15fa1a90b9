"""lm-eval's runner of transformers models, which reads contexts as everything here does (data/tokens.py)."""

from typing import Any

from lm_eval.models.huggingface import HFLM

from data.tokens import added_ids, begun_ids, check_ids, plain_ids


class Harness(HFLM):
    """HFLM whose contexts do not end with what the tokenizer appends.

    HFLM takes an answer's tokens to be those behind its question's: an eos behind both would take the place of one.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
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
