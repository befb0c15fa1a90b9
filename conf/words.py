"""Text that a user gives, made such that the readers behind it take it as it is.

    python -m conf.words model.path '/tmp/my models/a=b'    prints the word that gives Hydra this value

Hydra has a grammar for values (brackets, commas, quotes), and OmegaConf reads `${...}` in what comes out of it.
"""

import re
import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

PLAIN = re.compile(r"[\w.-]*/[\w./-]*", re.ASCII)  # a path or a hub id with no grammar in it


def escaped(value: Any) -> Any:
    """A value, or a tree of them, in which OmegaConf finds no interpolation."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    # Backslashes before an interpolation are halved with it.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def task_words() -> list[str]:
    """The words of the command line that Hydra runs, as they were given: Hydra takes them again."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(words)


def word(key: str, value: str) -> str:
    """The word of a command line that sets a key to this text, whatever stands in it."""
    if PLAIN.fullmatch(value):
        return f"{key}={value}"
    # In quotes all but quotes stands for itself; so do backslashes that are not before one.
    quoted = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), escaped(value))
    return f"{key}='{quoted}'"


if __name__ == "__main__":
    print(word(*sys.argv[1:]))
