"""Conversations as documents: a chat's messages travel as one text and become tokens by the tokenizer's template.

MARK begins such a text. No plain document can begin with it: they are stripped, and MARK counts as space.
What the model has said itself (data/converse.py) does not go back through its template, which may change an answer:
it stands behind its prompt as it was said, with what ended it (`ended_by`, empty where its room was used up).
"""

import json
from typing import Any

from jinja2.exceptions import TemplateError

from data.opening import valid
from data.tokens import plain_ids

MARK = "\x1e"

Message = dict[str, Any]


def as_text(messages: list[Message]) -> str:
    kept = [{name: value for name, value in each.items() if value is not None} for each in messages]
    return MARK + json.dumps(kept, default=str)


def is_chat(text: str) -> bool:
    return text.startswith(MARK)


def checked(value: Any) -> list[Message] | None:
    """A row's messages, each with a role and a text or tool calls; None for a row without any or with one that says
    nothing, ValueError for what is no conversation.

    Also taken: a list that is stored as its JSON, a list of structures that is stored as a structure of lists, and
    contents that are lists of parts, if all parts are text.
    """
    if isinstance(value, str) and value.strip():
        value = from_json(value)
    if value is None or value in ("", [], {}) or (isinstance(value, str) and value.isspace()):
        return None
    messages = [message(each) for each in list_of(value)]
    says = [each.get("content") is not None or bool(each.get("tool_calls")) for each in messages]
    return messages if all(says) and any(each.get("tool_calls") or said(each) for each in messages) else None


def from_json(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise not_messages(value) from None


def list_of(value: Any) -> list[Any]:
    if isinstance(value, dict) and all(isinstance(each, list) for each in value.values()):
        if len({len(each) for each in value.values()}) > 1:
            raise not_messages(value)
        return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise not_messages(value)
    return value


def message(value: Any) -> Message:
    """One message, its content as text; ValueError for none, and for text that no tokenizer can be given."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str) or not value["role"]:
        raise not_messages(value)
    if "content" not in value and not value.get("tool_calls"):  # null says nothing, and that is another matter
        raise not_messages(value)
    valid(json.dumps(value, default=str, ensure_ascii=False))
    return value | {"content": content(value.get("content"))}


def content(value: Any) -> str | None:
    if isinstance(value, list) and value:
        texts = [part["text"] for part in value if is_text(part)]
        if len(texts) == len(value):
            return "".join(texts)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"a message's content is text or parts of type text, not {short(value)}")
    return value


def is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def said(message: Message) -> bool:
    return bool(message["content"]) and not message["content"].isspace()


def not_messages(value: Any) -> ValueError:
    return ValueError(f"a conversation is a list of {{role, content}}, not {short(value)}")


def short(value: Any) -> str:
    return " ".join(str(value).split())[:100]


def chat_tokens(tokenizer: Any, text: str) -> list[int]:
    """What the model sees of a conversation; ValueError where its template refuses it."""
    *asked, last = messages = json.loads(text.removeprefix(MARK))
    try:
        if "ended_by" in last:
            rendered = prompt(tokenizer, asked) + last["content"] + last["ended_by"]
        else:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a conversation ({error}); leave such rows out of the data: "
            f"{text[1:300]}"
        ) from error
    return plain_ids(tokenizer, rendered)


def why_refused(tokenizer: Any, text: str) -> str:
    """What is wrong with a conversation that gives no tokens."""
    try:
        chat_tokens(tokenizer, text)
    except ValueError as error:
        return " ".join(str(error).split())
    return f"the tokenizer's chat template writes nothing of a conversation: {text[1:300]}"


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
