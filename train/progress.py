"""What the reader of a running fine-tuning sees: a bar on a terminal; elsewhere a line per logged step, and more
where those are far apart."""

import sys
import time

from tqdm import tqdm

from conf.progress import Pace


class Display:
    """`shown=False` (all processes but one) prints nothing. `done` of `steps` steps were made before a restart."""

    def __init__(self, steps: int, done: int, shown: bool):
        self.steps, self.done, self.shown = steps, done, shown
        self.started, self.pace = time.perf_counter(), Pace()
        terminal = shown and sys.stdout.isatty()
        self.bar = (
            tqdm(total=steps, initial=done, unit="step", file=sys.stdout, dynamic_ncols=True) if terminal else None
        )

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif self.shown:
            self.pace.spoke = self.pace.clock()
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Of work between steps or within one: on a bar, elsewhere a line where nothing was said for long."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=self.pace.due())
        elif self.pace.due():
            self.line(text)

    def step(self, step: int, row: dict[str, float] | None, loss: float, tokens_per_second: float) -> None:
        """Optimiser step `step` is done; `row` is given where it is a logged one."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self.bar.update()
        elif row is not None:
            self.line(
                f"step {row['step']}/{self.steps}  loss {row['loss']:.3f}  lr {row['lr']:.1e}  "
                f"{row['tokens_per_second']:,.0f} tokens/s  ETA {self.eta(int(row['step']))}"
            )
        else:
            self.note(f"step {step}/{self.steps}  {tokens_per_second:,.0f} tokens/s  ETA {self.eta(step)}")

    def eta(self, step: int) -> str:
        """Time left at the pace since the start, evaluations and checkpoints included: `5:12` or `1:05:12`."""
        seconds = (time.perf_counter() - self.started) / max(step - self.done, 1) * (self.steps - step)
        return tqdm.format_interval(seconds).removeprefix("0")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
