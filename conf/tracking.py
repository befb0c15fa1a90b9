"""Weights & Biases behind one context manager: online with a key or a server, offline without, or off.

Nothing here fails for want of a network, and nothing is only here: every number that goes to W&B also
stands in a JSON file of the stage that logged it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from typing import Any

from conf.schema import Config, TrackingMode
from conf.stage import Stage


def wandb_mode(mode: TrackingMode) -> str:
    """`online`, `offline` or `disabled`: what `auto` means here and now."""
    if mode is TrackingMode.none:
        return "disabled"
    if mode is not TrackingMode.auto:
        return mode.value
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if has_credentials() else "offline"


def has_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_BASE_URL"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, NetrcParseError):
        return False


@contextmanager
def open_run(config: Config, stage: Stage, settings: dict[str, Any]) -> Iterator[Any]:
    """A W&B run of this stage (`None` with tracking=none). `settings` is shown as the run's config.

    The id follows from the stage's key, so that a stage that was killed continues its own run.
    """
    mode = wandb_mode(config.tracking.mode)
    if mode == "disabled":
        yield None
        return
    import wandb

    run = wandb.init(
        project=config.tracking.project,
        entity=config.tracking.entity,
        dir=str(stage.folder),
        mode=mode,  # type: ignore[arg-type]  # one of its words
        id=f"{stage.name}-{stage.key}",
        resume="allow" if mode == "online" else None,
        name=f"{config.model.name}/{config.name}/{stage.name}",
        group=f"{config.model.name}/{config.name}",
        job_type=stage.name,
        config=settings,
        settings=wandb.Settings(console="off", silent=True),
    )
    try:
        yield run
    finally:
        run.finish()
    if mode == "offline":
        print(f"{stage.name}: offline W&B run, `wandb sync` uploads it from\n  {stage.folder / 'wandb'}", flush=True)
