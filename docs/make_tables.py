"""Write the documents' tables from the JSON in docs/results/, between the markers that name them.

    python docs/make_tables.py           rewrites README.md, docs/families.md and docs/scaling.md
    python docs/make_tables.py --check   exit code 1 if one of them and docs/results/ disagree
    python docs/make_tables.py --take outputs/MODEL/POINT/report
                                         first takes a run's report over as docs/results/default_run.*

No figure stands in these that is not in one of these files.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from result_tables import budget, cache, conversion, healing, support, tasks  # noqa: E402
from result_tables.common import RESULTS  # noqa: E402

TABLES: dict[str, Callable[[], str]] = {
    "default_run": tasks.default_run,
    "budget": budget.budget,
    "methods": conversion.methods,
    "ingredients": conversion.ingredients,
    "healing": healing.healing,
    "healing_losses": healing.healing_losses,
    "healing_long": healing.healing_long,
    "benchmarks": tasks.benchmarks,
    "benchmarks_default": tasks.benchmarks_default,
    "minilongbench": tasks.minilongbench,
    "minilongbench_chat": tasks.minilongbench_chat,
    "cache_bits": cache.cache_bits,
    "positions": healing.positions,
    "training_free": conversion.training_free,
    "bench": cache.bench,
    "train_bench": cache.train_bench,
}

DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": TABLES,
    "docs/families.md": {"families": support.families},
    "docs/scaling.md": {"scaling": support.scaling, "scaling_measured": support.scaling_measured},
}


def filled(text: str, document: str = "README.md") -> str:
    """The text with every marked block made anew; ValueError for a table without a block."""
    for name, make in DOCUMENTS[document].items():
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"{document} has no block <!-- {name} --> … <!-- /{name} -->")
        made = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text = block.sub(made.replace("\\", r"\\"), text)
    return text


def take(report: Path) -> None:
    """Copy a run's results and picture, without the folders of the machine it ran on."""
    text = re.sub(r"(?<![\w.:])/(?:[\w.-]+/)+", "", (report / "results.json").read_text())
    (RESULTS / "default_run.json").write_text(json.dumps(json.loads(text), indent=1) + "\n")
    shutil.copy(report / "reduction_vs_drop.png", RESULTS / "default_run.png")


if __name__ == "__main__":
    if "--take" in sys.argv:
        take(Path(sys.argv[sys.argv.index("--take") + 1]))
    disagree = False
    for document in DOCUMENTS:
        before = (ROOT / document).read_text()
        after = filled(before, document)
        disagree |= after != before
        if "--check" not in sys.argv:
            (ROOT / document).write_text(after)
    sys.exit(disagree and "--check" in sys.argv)
