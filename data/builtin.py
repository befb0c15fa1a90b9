"""Text that every installation carries: documentation and source of its Python packages.

Three corpora, named by `data.sources.<any>.name`:

    prose       package descriptions, .md / .rst / .txt files, the language reference of `help()`
    docstrings  what `help()` shows of a module: signatures and docstrings, without the code
    code        source files of installed packages

The standard library gives documentation but no code, which stays unseen for evaluation, and a source file
gives either its docstrings or its code. Benchmarks' own files, tests, vendored copies and licences are left
out. Which files there are depends on the environment; which of them are read, on names and seed alone.
"""

import ast
import functools
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from email.policy import compat32
from hashlib import blake2b
from pathlib import Path

CORPORA = ("prose", "docstrings", "code")
SKIPPED_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test"),
    *("_vendor", "_vendored", "vendor", "vendored_packages", "third_party", "extern", "licenses", "license_files"),
    *("encodings", "lib2to3", "turtledemo", "node_modules", "locale"),
}
SKIPPED_PATHS = ("lm_eval/tasks",)  # benchmarks
SKIPPED_NAMES = re.compile(
    r"licen[cs]e|copying|notice|authors|credits|requirements|constraints|top_level|entry_points|sources\.txt"
    r"|vocab|grammar|tlds|cmakelists|idf\.txt|dict\.txt|^test_|^conftest|_test\.py$",
    re.IGNORECASE,
)
PROSE = (".md", ".rst", ".txt")
SIZES = {"prose": (400, 400_000), "docstrings": (2_000, 400_000), "code": (1_000, 60_000)}  # bytes of a file
LONGEST = {"prose": 32_000, "docstrings": 16_000, "code": 12_000}  # characters: small samples want many documents
TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class File:
    name: str  # below its root: the same in every environment that has the package
    path: str
    size: int


@functools.cache
def environment_files() -> dict[str, list[File]]:
    """All usable files of this interpreter's environment by corpus, sorted by name."""
    roots = {sysconfig.get_path("stdlib"): True, sysconfig.get_path("purelib"): False}
    roots.setdefault(sysconfig.get_path("platlib"), False)
    found: dict[str, dict[str, File]] = {corpus: {} for corpus in CORPORA}
    for root, standard in roots.items():
        for folder, folders, names in os.walk(root):
            below = os.path.relpath(folder, root)
            folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not below.startswith(SKIPPED_PATHS)]
            for name in names:
                relative = os.path.normpath(os.path.join(below, name)).replace(os.sep, "/")
                corpus = corpus_of(relative, standard)
                if corpus is None:
                    continue
                path = os.path.join(folder, name)
                size = os.stat(path).st_size
                smallest, largest = SIZES[corpus]
                if relative == TOPICS or smallest <= size <= largest:
                    found[corpus][relative] = File(relative, path, size)
    return {corpus: [files[name] for name in sorted(files)] for corpus, files in found.items()}


def corpus_of(relative: str, standard: bool) -> str | None:
    """Which corpus a file belongs to, by its name alone; None if to none."""
    name = relative.rsplit("/", 1)[-1]
    if relative == TOPICS or name == "METADATA":
        return "prose"
    if SKIPPED_NAMES.search(name):
        return None
    if name.endswith(PROSE):
        return "prose"
    if name.endswith(".py"):
        if standard:
            return "docstrings"
        return "code" if blake2b(relative.encode(), digest_size=1).digest()[0] < 64 else "docstrings"
    return None


def read_texts(corpus: str, path: str) -> Iterator[str]:
    """The documents of one file: none where it is not text worth reading."""
    if path.replace(os.sep, "/").endswith(TOPICS):
        yield from python_topics(path)
        return
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (UnicodeDecodeError, FileNotFoundError):
        return
    if Path(path).name == "METADATA":
        content = str(message_from_string(content, policy=compat32).get_payload())
    elif corpus == "docstrings":
        content = docstrings(content)
    content = beginning(content, LONGEST[corpus])
    if is_text(content, strict=corpus == "prose"):
        yield content


def beginning(content: str, longest: int) -> str:
    return content if len(content) <= longest else content[: content.rfind("\n", 0, longest) + 1]


def is_text(content: str, strict: bool) -> bool:
    """Enough of it, and made of words rather than tables of numbers or packed data."""
    if len(content) < 400:
        return False
    longest = max(map(len, content.splitlines()), default=0)
    letters = sum(map(str.isalpha, content)) / len(content)
    ascii_share = len(content.encode("ascii", "ignore")) / len(content)
    return ascii_share > 0.9 and letters > (0.55 if strict else 0.4) and (strict or longest < 2_000)


def docstrings(source: str) -> str:
    """Signatures and docstrings of a module in the order of its source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    head = ast.get_docstring(module)
    blocks = [head] if head else []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(child)
            if text and len(text) > 40:
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                kind = "class " if isinstance(child, ast.ClassDef) else ""
                blocks.append(f"{kind}{prefix}{child.name}{arguments}\n\n{text}")
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")

    visit(module, "")
    return "\n\n\n".join(blocks)


def python_topics(path: str) -> Iterator[str]:
    """The sections of the language reference that `help('topics')` lists."""
    module = ast.parse(Path(path).read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (text for text in ast.literal_eval(node.value).values() if len(text) >= 400)
