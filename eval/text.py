"""English and code that the Python environment itself carries, for the built-in tasks.

Paragraphs come from the language reference (`pydoc_data`) and the docstrings of the standard library's
modules, code from their sources. Its modules are read, not run. Other Python versions carry slightly
other text: results say which version they were made with.
"""

import ast
import importlib
import re
import sysconfig
from functools import cache
from pathlib import Path

# Modules whose docstrings speak of one thing, and what it is called as a class of `classification`.
TOPICS = {
    "turtle": "drawing",
    "_pydecimal": "arithmetic",
    "tarfile": "archives",
    "imaplib": "mail",
    "threading": "threads",
    "calendar": "dates",
    "http/cookiejar": "cookies",
    "unittest/mock": "testing",
}


@cache
def docstrings(file: Path) -> list[str]:
    """All docstrings of one source file, in order."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def paragraphs_of(text: str, fewest: int, most: int) -> list[str]:
    """Paragraphs of running prose: no lists, no code, `fewest` to `most` words, white space collapsed."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        words = block.split()
        plain = not block.startswith(" ") and "::" not in block and ">>>" not in block
        if plain and fewest <= len(words) <= most and words[0][0].isupper() and words[-1].endswith("."):
            kept.append(" ".join(words))
    return kept


@cache
def passages() -> tuple[str, ...]:
    """Some thousand distinct paragraphs of 30 to 120 words."""
    found: dict[str, None] = {}
    try:
        reference = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        reference = {}
    for text in reference.values():
        found.update(dict.fromkeys(paragraphs_of(text, 30, 120)))
    for file in sorted(library().glob("*.py")):
        for text in docstrings(file):
            found.update(dict.fromkeys(paragraphs_of(text, 30, 120)))
    return tuple(found)


@cache
def topic_sentences() -> dict[str, tuple[str, ...]]:
    """Per topic the first sentences of its module's docstrings, 5 to 25 words."""
    found = {}
    for module, topic in TOPICS.items():
        first = (re.split(r"\n\s*\n", text)[0] for text in docstrings(library() / f"{module}.py"))
        sentences = dict.fromkeys(" ".join(text.split()) for text in first)
        kept = tuple(s for s in sentences if 5 <= len(s.split()) <= 25 and s.endswith(".") and ">>>" not in s)
        if len(kept) >= 8:
            found[topic] = kept
    return found


@cache
def code_files() -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    """Lines of the standard library's modules, and which of them are worth guessing."""
    files = []
    for file in sorted(library().glob("*.py")):
        try:
            lines = tuple(file.read_text(encoding="utf-8").split("\n"))
        except (OSError, UnicodeDecodeError):
            continue
        targets = tuple(i for i in range(len(lines) // 3, len(lines)) if worth_guessing(lines[i]))
        if len(targets) >= 20:
            files.append((lines, targets))
    return tuple(files)


def worth_guessing(line: str) -> bool:
    """Code rather than prose: the scorer skips comments, and a docstring's words are nobody's guess."""
    text = line.strip()
    starts = ("self.", "return ", "if ", "for ", "raise ", "def ", "while ", "with ", "elif ")
    return 12 <= len(text) <= 80 and text.startswith(starts) and not set("#`") & set(text) and "//" not in text
