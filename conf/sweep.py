"""End of a sweep: one table and one picture over all points, and an exit code that tells of failures.

A Hydra callback (conf/config.yaml); it sees only what the points left on disk, so it works with any launcher.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        command = [sys.executable, "-m", "eval.sweep", str(folder)]
        reported = subprocess.run(command, check=False).returncode == 0
        points = [json.loads(file.read_text()) for file in sorted(folder.glob("*/point.json"))]
        failed = [point for point in points if point["status"] != "finished"]
        if failed or not reported:
            print(f"{len(failed)} of {len(points)} points of this sweep failed; see {folder}", file=sys.stderr)
            sys.exit(1)
