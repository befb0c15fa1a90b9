"""Where the rows of the generation tasks come from: a local folder, the hub, or built-in generators.

Rows have LongBench's eight fields; the five that scoring needs are checked (eval/rows.py), so that a file of another
form is an error before any model is loaded.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from conf.evaluation import LONGBENCH_TASKS, LONGBENCH_V2, EvalConfig, TaskSource
from data.rows import row_a_line
from eval import longbench_v2
from eval.builtin import DEFAULT_ROWS, builtin_rows
from eval.rows import REQUIRED, checked_rows, longbench_row, members_of, rows_of_file, rows_of_member
from eval.tasks import Row, Task, longbench_tasks, task_table

HUB_REPOSITORY, HUB_FILE = "THUDM/LongBench", "data.zip"


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
    return [
        (
            name,
            longbench_v2.read(files[name]) if name == LONGBENCH_V2 else read_rows(files[name], longbench_tasks()[name]),
        )
        for name in wanted_tasks
    ]


def read_rows(file: Path, task: Task) -> list[Row]:
    """Rows of a task's file, JSON lines or an array; ValueError with the place for one that cannot be scored."""
    return checked_rows(rows_of_file(file), str(file), REQUIRED, partial(fitted, task))


def fitted(task: Task, row: Row) -> Row:
    return task.fit(longbench_row(row))


def parse_rows(lines: Iterable[str], name: str) -> list[Row]:
    """Rows of JSON lines, whatever the task; ValueError with the place for a broken line or a missing column."""
    return checked_rows(row_a_line(lines), name, REQUIRED, longbench_row)


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
    members = {Path(name).name: name for name in members_of(file) if "__MACOSX" not in name}
    found = []
    for name in tasks or LONGBENCH_TASKS:
        member = members.get(f"{name}.jsonl")
        if member is None:
            raise ValueError(f"{file} holds no {name}.jsonl; it has {', '.join(sorted(members))}")
        take = partial(fitted, longbench_tasks()[name])
        found.append((name, checked_rows(rows_of_member(file, member), f"{file}:{member}", REQUIRED, take)))
    return found
