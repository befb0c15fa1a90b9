"""W&B never costs a run: what it cannot do is one line, and the stage goes on offline or without it."""

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import wandb
from wandb.sdk.lib import wbauth

from conf import tracking
from conf.schema import Config, ModelConfig, TrackingConfig, TrackingMode
from conf.stage import Stage
from conf.tracking import forget_session, open_run, wandb_mode
from tests.eval.wandb_file import read_run

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine where nobody has logged in, and no run of another test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    forget_session()
    yield
    forget_session()


class Server(ThreadingHTTPServer):
    """A W&B server that refuses every key (401), breaks down (500), answers nonsense, hangs or hangs up."""

    daemon_threads = True

    def __init__(self, answer: str) -> None:
        self.answer, self.ended = answer, threading.Event()
        super().__init__(("127.0.0.1", 0), Answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.answer == "hang":
            self.server.ended.wait(30)
        if self.server.answer in ("hang", "close"):
            return
        self.send_response(200 if self.server.answer == "nonsense" else int(self.server.answer))
        self.send_header("content-length", "3")
        self.end_headers()
        self.wfile.write(b"<p>")

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


def track(folder: Path, mode: TrackingMode) -> float:
    """A stage that logs one number; the seconds it took."""
    began = time.monotonic()
    config = Config(model=ModelConfig(path="org/name"), tracking=TrackingConfig(mode=mode))
    folder.mkdir(exist_ok=True)
    with open_run(config, Stage("finetune", folder, {}, {}), {"rate": 1}) as tracker:
        tracker.do(lambda run: run.log({"loss": 2.5}, step=1))
    return time.monotonic() - began


def kept(folder: Path) -> float:
    """The number that the one offline run of the stage holds."""
    [run] = folder.glob("wandb/offline-run-*")
    return read_run(run)["history"][0]["loss"]


@pytest.mark.parametrize(
    ("answer", "mode"),
    [("401", "auto"), ("500", "auto"), ("nonsense", "online"), ("hang", "online"), ("close", "auto"), ("gone", "auto")],
)
def test_a_server_that_refuses_or_does_not_answer(
    answer: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    server = Server("close" if answer == "gone" else answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if answer == "gone":
        server.shutdown()
        server.server_close()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    track(tmp_path / "stage", TrackingMode(mode))
    server.ended.set()
    out = capsys.readouterr().out
    assert "connecting to W&B, for at most 1 s" in out
    assert out.count("finetune: W&B failed (") == 1 and out.count("going on offline") == 1
    assert "wandb sync" in out and kept(tmp_path / "stage") == 2.5


def test_the_wait_is_short_unless_asked_for() -> None:
    assert 10 <= tracking.WAITS["init_timeout"] <= 30 and 0 < tracking.WAITS["finish_timeout"] <= 120


@pytest.mark.parametrize("place", [".netrc", "elsewhere"])
def test_the_key_that_wandb_login_keeps_is_found(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under the address that this version of W&B has, in the file it writes, or in the one that NETRC names."""
    assert wandb_mode(TrackingMode.auto) == "offline"
    if place != ".netrc":
        monkeypatch.setenv("NETRC", str(tmp_path / place))
    wbauth.write_netrc_auth(host=wandb.Settings().base_url, api_key=KEY)
    assert wandb_mode(TrackingMode.auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    forget_session()
    assert wandb_mode(TrackingMode.auto) == "offline"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WANDB_API_KEY", "abc", "API key must have 40+ characters"),
        ("WANDB_MODE", "ofline", "WANDB_MODE: Input should be 'online', 'offline'"),
        ("WANDB_BASE_URL", "nowhere", "WANDB_BASE_URL: Input should be a valid URL"),
        ("WANDB_INIT_TIMEOUT", "soon", "WANDB_INIT_TIMEOUT: Input should be a valid number"),
        ("NETRC", "", "no API key"),
    ],
)
def test_what_the_environment_says_wrongly_costs_no_run(
    name: str,
    value: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv(name, value)
    track(tmp_path / "stage", TrackingMode.online)
    out = capsys.readouterr().out
    assert said in out and out.count("going on offline") == 1, out
    assert kept(tmp_path / "stage") == 2.5


def test_a_folder_that_cannot_be_written_leaves_the_run_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", full)
    track(tmp_path / "stage", TrackingMode.auto)
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 2 and "going on without it" in out


def test_a_service_that_dies_ends_the_tracking_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = Config(model=ModelConfig(path="org/name"), tracking=TrackingConfig(mode=TrackingMode.offline))
    with open_run(config, Stage("finetune", tmp_path, {}, {}), {}) as tracker:
        services = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
        assert services
        for service in services:
            service.kill()
            service.wait()
        for step in range(3):
            tracker.do(lambda run, step=step: run.log({"loss": 1.0}, step=step))
    out = capsys.readouterr().out
    assert out.count("finetune: W&B failed (") == 1 and "wandb sync" in out


def test_a_project_that_wandb_refuses_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match=r"tracking\.project=a/b must not contain"):
        TrackingConfig(project="a/b")
