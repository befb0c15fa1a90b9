"""Conversations as documents: a chat's messages travel as one text and become tokens by the tokenizer's template.

MARK begins such a text. No plain document can begin with it: they are stripped, and MARK counts as space.
"""

import json
from typing import Any

from jinja2.exceptions import TemplateError

MARK = "\x1e"

Messages = list[dict[str, str]]


def as_text(messages: Messages) -> str:
    names = ("role", "content", "unfinished")
    kept = [{name: each[name] for name in names if each.get(name) is not None} for each in messages]
    return MARK + json.dumps(kept)


def is_chat(text: str) -> bool:
    return text.startswith(MARK)


def checked(value: Any) -> Messages | None:
    """A row's messages; None for an empty row, ValueError for what is no conversation."""
    if not value:
        return None
    if not isinstance(value, list) or not all(
        isinstance(each, dict) and {"role", "content"} <= set(each) for each in value
    ):
        raise ValueError(f"a conversation is a list of {{role, content}}, not {str(value)[:100]}")
    return list(value)


def chat_tokens(tokenizer: Any, text: str) -> list[int]:
    """What the model sees of a conversation: the template ends its turns, but for a last one marked `unfinished`."""
    messages = json.loads(text.removeprefix(MARK))
    goes_on = bool(messages[-1].get("unfinished"))
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, continue_final_message=goes_on
        )
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses a conversation ({error}): {text[:300]}") from error
    return ids


def require_template(tokenizer: Any, key: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{key}: the tokenizer of {tokenizer.name_or_path} has no chat template to write conversations with; "
            "give a source of plain text (text_column)"
        )
