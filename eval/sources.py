"""Where the rows of the generation tasks come from: a local folder, the hub, or built-in generators.

Rows have LongBench's eight fields; the five that scoring needs are checked, so that a file of another form
is an error before any model is loaded.
"""

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from conf.evaluation import LONGBENCH_TASKS, LONGBENCH_V2, EvalConfig, TaskSource
from eval import longbench_v2
from eval.builtin import DEFAULT_ROWS, builtin_rows
from eval.tasks import Row, Task, task_table

REQUIRED = ("_id", "input", "context", "answers", "all_classes")
HUB_REPOSITORY, HUB_FILE = "THUDM/LongBench", "data.zip"
READERS = {LONGBENCH_V2: longbench_v2.read}  # of files that are not JSON lines


def load_rows(config: EvalConfig, fits: Callable[[Task, str], bool]) -> list[tuple[Task, list[Row]]]:
    """The wanted tasks and their rows, `eval.limit` of each. `fits(task, prompt)` sizes the built-in rows."""
    table = task_table(config.source)
    if config.source is TaskSource.builtin:
        wanted = [table[name] for name in config.tasks or table]
        rows = config.limit or DEFAULT_ROWS

        def bound(task: Task) -> Callable[[str], bool]:
            return lambda prompt: fits(task, prompt)

        return [(task, builtin_rows(task, rows, config.seed, bound(task))) for task in wanted]
    read = local_reader(config) if config.source is TaskSource.local else hub_reader(config.tasks)
    table = table | {LONGBENCH_V2: longbench_v2.TASK}
    return [(table[name], rows[: config.limit]) for name, rows in read]


def local_reader(config: EvalConfig) -> Iterable[tuple[str, list[Row]]]:
    """Tasks of a folder of <task>.jsonl; all that are LongBench's if none are named."""
    folder = Path(str(config.data_dir)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"eval.data_dir={config.data_dir}: no such folder")
    files = {name: folder / f"{name}.jsonl" for name in LONGBENCH_TASKS}
    files[LONGBENCH_V2] = folder / f"{LONGBENCH_V2}.json"
    there = [name for name, file in files.items() if file.is_file()]
    missing = [name for name in config.tasks if name not in there]
    if missing or not there:
        has = f"it has {', '.join(there)}" if there else "it has no file that is named after a LongBench task"
        wanted = ", ".join(files[name].name for name in missing) or "<task>.jsonl"
        raise ValueError(f"eval.data_dir={folder}: {wanted} not found; {has}")
    wanted_tasks = config.tasks or [name for name in there if name != LONGBENCH_V2] or there
    return [(name, READERS.get(name, read_rows)(files[name])) for name in wanted_tasks]


def read_rows(file: Path) -> list[Row]:
    with file.open(encoding="utf-8") as stream:
        return parse_rows(stream, str(file))


def parse_rows(lines: Iterable[str], name: str) -> list[Row]:
    """Rows of JSON lines; ValueError with the place for a broken line or a missing column."""
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}:{number} is not JSON: {error}") from None
        missing = [column for column in REQUIRED if column not in row]
        if missing:
            raise ValueError(
                f"{name}:{number} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                f"a row of LongBench's form has {', '.join(REQUIRED)}; this one has {', '.join(row)}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{name} holds no rows")
    return rows


def hub_reader(tasks: list[str]) -> Iterable[tuple[str, list[Row]]]:
    """LongBench from the files of its repositories (its loading script is not supported any more)."""
    first = [name for name in tasks if name != LONGBENCH_V2]
    found = [] if tasks and not first else zip_rows(hub_file(HUB_REPOSITORY, HUB_FILE, "<task>.jsonl, unpacked"), first)
    if LONGBENCH_V2 in tasks:
        file = hub_file(longbench_v2.HUB_REPOSITORY, longbench_v2.HUB_FILE, f"{LONGBENCH_V2}.json")
        found.append((LONGBENCH_V2, longbench_v2.read(file)))
    return found


def hub_file(repository: str, name: str, local: str) -> Path:
    """A file of a data set on the hub; ValueError that says what to put where if it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"eval.source=hub: {repository} cannot be reached ({type(error).__name__}: {reason}). Where there is "
            f"a network, get https://huggingface.co/datasets/{repository}/resolve/main/{name}, put it into a folder as "
            f"{local}, and give eval.source=local eval.data_dir=<that folder>"
        ) from None


def zip_rows(file: Path, tasks: list[str]) -> list[tuple[str, list[Row]]]:
    """Rows of `data/<task>.jsonl` (in whatever folder) inside LongBench's zip file."""
    found = []
    with zipfile.ZipFile(file) as archive:
        members = {Path(name).name: name for name in archive.namelist() if "__MACOSX" not in name}
        for task in tasks or LONGBENCH_TASKS:
            member = members.get(f"{task}.jsonl")
            if member is None:
                raise ValueError(f"{file} holds no {task}.jsonl; it has {', '.join(sorted(members))}")
            lines = archive.read(member).decode("utf-8").split("\n")  # not splitlines: U+2028 is no line end
            found.append((task, parse_rows(lines, f"{file}:{member}")))
    return found
