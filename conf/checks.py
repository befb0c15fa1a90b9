"""Checks of options, whose messages name the key to change."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
