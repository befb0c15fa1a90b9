"""One thread a test, and the table of what works for which family, made from the tests that show it.

python -m pytest tests/mha2mla -m capability -n 2 --family-table docs/results/families.json
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from conf.stage import provenance


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models on several threads mostly wait for each other, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family-table", type=Path, help="write what works for which family as JSON")
    parser.addoption("--fuzz", type=int, default=1, help="so many times as many damaged inputs (tests/fuzz.py)")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> int:
    """Times as many damaged inputs as by default."""
    return int(request.config.getoption("--fuzz"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a test shows of a family rides on its report, which also comes back from other processes."""
    for item in items:
        marker, call = item.get_closest_marker("capability"), getattr(item, "callspec", None)
        if marker and call and "family" in call.params:
            item.user_properties.append(("capability", [call.params["family"], *marker.args]))


outcomes: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = dict(report.user_properties).get("capability")
    if found and (report.when == "call" or report.failed):
        family, name, *value = found
        outcomes[family][name]["failed" if report.failed else value[0] if value else "yes"] += not report.skipped


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--family-table")
    if file and not hasattr(session.config, "workerinput"):
        rows = {family: {name: dict(counts) for name, counts in found.items()} for family, found in outcomes.items()}
        file.write_text(json.dumps({"families": rows, "provenance": provenance()}, indent=1, sort_keys=True) + "\n")
