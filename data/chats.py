"""Conversations as documents: a chat's messages travel as one text and become tokens by the tokenizer's template.

MARK begins such a text. No plain document can begin with it: they are stripped, and MARK counts as space.
What the model has said itself (data/converse.py) does not go back through its template, which may change an answer:
it stands behind its prompt as it was said, with what ended it (`ended_by`, empty where its room was used up).
"""

import json
from typing import Any

from jinja2.exceptions import TemplateError

from data.tokens import plain_ids

MARK = "\x1e"

Message = dict[str, Any]


def as_text(messages: list[Message]) -> str:
    kept = [{name: value for name, value in each.items() if value is not None} for each in messages]
    return MARK + json.dumps(kept, default=str)


def is_chat(text: str) -> bool:
    return text.startswith(MARK)


def checked(value: Any) -> list[Message] | None:
    """A row's messages; None for a row without any or with one that says nothing, ValueError for no conversation."""
    if not value:
        return None
    if isinstance(value, dict):  # a list of structures that was stored as a structure of lists
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(each, dict) and "role" in each for each in value):
        raise ValueError(f"a conversation is a list of {{role, content}}, not {str(value)[:100]}")
    says = [each.get("content") is not None or bool(each.get("tool_calls")) for each in value]
    if not any(says):
        raise ValueError(f"a conversation is a list of {{role, content}}, not {str(value)[:100]}")
    return value if all(says) else None


def chat_tokens(tokenizer: Any, text: str) -> list[int]:
    """What the model sees of a conversation; ValueError where its template refuses it."""
    *asked, last = messages = json.loads(text.removeprefix(MARK))
    try:
        if "ended_by" in last:
            rendered = prompt(tokenizer, asked) + last["content"] + last["ended_by"]
        else:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a conversation ({error}); leave such rows out of the data: "
            f"{text[1:300]}"
        ) from error
    return plain_ids(tokenizer, rendered)


def prompt(tokenizer: Any, messages: list[Message]) -> str:
    """A conversation up to where the model answers."""
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered


def require_template(tokenizer: Any, key: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{key}: the tokenizer of {tokenizer.name_or_path} has no chat template to write conversations with; "
            "use plain text (data=builtin, or a source with a text_column)"
        )
