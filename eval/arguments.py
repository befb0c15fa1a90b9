"""What the command lines that compare checkpoints have in common."""

from pathlib import Path


def named_checkpoints(words: list[str]) -> dict[str, Path]:
    """Folders by name, from words NAME=FOLDER; ValueError where one holds no checkpoint."""
    models = {name: Path(folder) for name, _, folder in (word.partition("=") for word in words)}
    wrong = [str(folder) for folder in models.values() if not (folder / "config.json").exists()]
    if wrong:
        raise ValueError(f"no checkpoint in {', '.join(wrong)}; give NAME=FOLDER")
    return models
