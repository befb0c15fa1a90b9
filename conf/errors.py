"""How a stage ends when something is wrong: one line; the traceback with HYDRA_FULL_ERROR=1."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from omegaconf import DictConfig

from conf.schema import Config, typed_config

LONGEST = 300  # of what a library says, in an error of ours
# Libraries that read what a user gives, and raise for it what are no ValueErrors.
READERS = {
    "datasets",
    "huggingface_hub",
    "httpx",
    "jinja2",
    "omegaconf",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "yaml",
}


class StageError(RuntimeError):
    """A stage that was started did not finish; what went wrong stands above in its own output."""


def one_line(error: BaseException | str) -> str:
    """What a library says, which may be pages, as a part of one line of ours."""
    said = " ".join(str(error).split())
    name = "" if isinstance(error, str) or said else type(error).__name__
    return name + (said if len(said) <= LONGEST else said[: LONGEST - 1] + "…")


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """End the program with `error: ...` for what a user can mend: an error of ours, or of a library that reads what was
    given. Any other is a mistake of ours and keeps its traceback."""
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not (said := said_to_user(error)):
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        sys.exit(1)


def said_to_user(error: Exception) -> str | None:
    """The line that says what to mend; None if it is nothing that a user did."""
    library = type(error).__module__.partition(".")[0].removesuffix("_rust")
    if isinstance(error, ValueError | OSError | StageError):
        return re.sub(r"\s*\n\s*", " ", str(error)) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({one_line(error)}); take smaller batches or a smaller model, or a larger machine"
    if library in READERS:
        return f"{library} cannot use what it was given ({type(error).__name__}: {one_line(error)})"
    return None


def stage_main(run: Callable[[Config], None]) -> Callable[[DictConfig], None]:
    """Wrap a stage's function as a Hydra main: typed configuration in, mistakes of the user out."""

    @functools.wraps(run)
    def main(cfg: DictConfig) -> None:
        with ends_in_one_line():
            run(typed_config(cfg))

    return main
