"""How a stage ends when something is wrong: one line; the traceback with HYDRA_FULL_ERROR=1."""

import functools
import os
import sys
from collections.abc import Callable

from omegaconf import DictConfig

from conf.schema import Config, typed_config

LONGEST = 300  # of what a library says, in an error of ours


class StageError(RuntimeError):
    """A stage that was started did not finish; what went wrong stands above in its own output."""


def one_line(error: BaseException | str) -> str:
    """What a library says, which may be pages, as a part of one line of ours."""
    said = " ".join(str(error).split())
    name = "" if isinstance(error, str) or said else type(error).__name__
    return name + (said if len(said) <= LONGEST else said[: LONGEST - 1] + "…")


def stage_main(run: Callable[[Config], None]) -> Callable[[DictConfig], None]:
    """Wrap a stage's function as a Hydra main: typed configuration in, mistakes of the user out."""

    @functools.wraps(run)
    def main(cfg: DictConfig) -> None:
        try:
            run(typed_config(cfg))
        except (ValueError, OSError, StageError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    return main
