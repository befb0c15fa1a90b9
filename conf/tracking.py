"""Weights & Biases behind one context manager: online with a key, offline without, or off.

Nothing here ends a stage or holds it up for long. What W&B cannot do is said in one line, and the stage goes on
offline, or without it; every number that goes to W&B also stands in a JSON file of the stage that logged it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from conf.errors import one_line
from conf.schema import Config, TrackingMode
from conf.stage import Stage

# Seconds that a stage waits for W&B at its start, and at its end for what is not yet uploaded; the rest stays on disk.
WAITS = {"init_timeout": 20.0, "finish_timeout": 60.0}


class Tracker:
    """The W&B run of a stage, if there is one. The first failure is said and ends the tracking, not the stage."""

    def __init__(self, stage: str, run: Any = None) -> None:
        self.stage, self.run, self.failed = stage, run, False

    def do(self, action: Callable[[Any], Any]) -> None:
        """Call `action` with the run: all that logs goes through here."""
        if self.run is not None and not self.failed:
            self._attempt(action)

    def finish(self) -> None:
        if self.run is None:
            return
        if not self.run.settings._offline:
            print(f"{self.stage}: uploading to W&B, for at most {self.run.settings.finish_timeout:g} s", flush=True)
        self._attempt(lambda run: run.finish())
        if self.failed:
            forget_session()
        if self.failed or self.run.settings._offline:
            kept = "what was logged" if self.failed else "offline W&B run"
            print(f"{self.stage}: {kept}, `wandb sync` uploads it from\n  {self.run.settings.sync_dir}", flush=True)

    def _attempt(self, action: Callable[[Any], Any]) -> None:
        try:
            action(self.run)
        except Exception as error:
            if not self.failed:
                print(f"{self.stage}: W&B failed ({one_line(error)}); no more is logged there", flush=True)
            self.failed = True


@contextmanager
def open_run(config: Config, stage: Stage, settings: dict[str, Any]) -> Iterator[Tracker]:
    """A W&B run of this stage (an idle tracker with tracking=none). `settings` is shown as the run's config.

    The id follows from the stage's key, so that a stage that was killed continues its own run.
    """
    tracker = Tracker(stage.name, start(config, stage, settings))
    try:
        yield tracker
    finally:
        tracker.finish()


def start(config: Config, stage: Stage, settings: dict[str, Any]) -> Any:
    """The run, offline where W&B is out of reach or refuses; None where it is off or cannot even be written."""
    wanted = config.tracking.mode
    if wanted is TrackingMode.none:
        return None
    run_id = f"{stage.name}-{stage.key}"
    # W&B may hold on to the id of a run that did not start: the second attempt has one of its own.
    attempts = ((wanted, run_id, "offline"), (TrackingMode.offline, f"{run_id}-offline", "without it"))
    for mode, own_id, otherwise in attempts:
        try:
            return init(config, stage, settings, wandb_mode(mode), own_id)
        except Exception as error:
            print(f"{stage.name}: W&B failed ({one_line(error)}); going on {otherwise}", flush=True)
            forget_session()
    return None


def wandb_mode(mode: TrackingMode) -> str:
    """A mode of W&B's own: what `auto` means here and now. ValueError or W&B's own error for a variable or a key that
    W&B does not take, and for `online` without a key (W&B would ask for one, and wait for the answer)."""
    refused = drop_refused_variables()
    if mode is TrackingMode.offline:
        return "offline"
    if refused:
        raise ValueError("; ".join(refused))
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    own = wandb_setup.singleton().settings  # from WANDB_ variables and the files of `wandb offline` and the like
    if mode is TrackingMode.auto and (own._offline or own._noop):
        return own.mode
    host = own.base_url
    if wbauth.authenticate_session(host=host, source="mha2mla", prompt=False, update_session=False):
        return own.mode if mode is TrackingMode.auto else "online"
    if mode is TrackingMode.online:
        raise ValueError(f"no API key for {host}: `wandb login` keeps one")
    return "offline"


def drop_refused_variables() -> list[str]:
    """Take the WANDB_ variables out of the environment that W&B refuses, for it reads none then; why, by name. Values
    are not shown: one may be a key."""
    import wandb

    refused = []
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        try:
            wandb.Settings().update_from_env_vars({name: os.environ[name]})
        except ValueError as error:
            errors = error.errors() if hasattr(error, "errors") else [{"msg": str(error)}]
            refused.append(f"{name}: {errors[0]['msg']}")
            del os.environ[name]
    return refused


def init(config: Config, stage: Stage, settings: dict[str, Any], mode: str, run_id: str) -> Any:
    if mode == "disabled":
        return None
    import wandb

    with suppress(ImportError):  # its telemetry waits half a minute for a server that does not answer
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()
    waits: Any = {name: float(os.environ.get(f"WANDB_{name.upper()}", seconds)) for name, seconds in WAITS.items()}
    online = mode not in ("offline", "dryrun")
    if online:
        print(f"{stage.name}: connecting to W&B, for at most {waits['init_timeout']:g} s", flush=True)
    return wandb.init(
        project=config.tracking.project,
        entity=config.tracking.entity,
        dir=str(stage.folder),
        mode=mode,  # type: ignore[arg-type]  # one of its words
        id=run_id,
        resume="allow" if online and mode != "shared" else None,
        name=f"{config.model.name}/{config.name}/{stage.name}",
        group=f"{config.model.name}/{config.name}",
        job_type=stage.name,
        config=settings,
        settings=wandb.Settings(console="off", silent=True, finish_timeout_raises=True, **waits),
    )


def forget_session() -> None:
    """Free the id of a run that did not start, and let W&B read its environment anew."""
    with suppress(Exception):
        import wandb

        wandb.teardown(1)
