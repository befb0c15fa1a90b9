"""Checks of options, whose messages name the key to change."""

from pathlib import Path


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def home_expanded(key: str, path: str) -> str:
    """A path with its leading ~ or ~user replaced; ValueError if there is no such home."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError(f"{key}={path}: {error}") from error


def require_folder_name(key: str, name: str) -> None:
    """ValueError unless `name` can name one folder: results go there, and nowhere else."""
    require(
        name.strip() not in ("", ".", "..") and not set(name) & set("/\\\0\n") and len(name.encode()) <= 200,
        f"{key}={name!r} names a folder: give one name, without / and \\, of at most 200 bytes",
    )
