"""What ``quick`` says on the terminal: a table that fills in, then what won and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .problems import Problem
from .reading import number, slopes, won, words
from .results import DISTANCE, ERROR, Outcome, called, milestones

if TYPE_CHECKING:
    from .quick import Quick


class Screen:
    """A console and the run it speaks of."""

    def __init__(self, config: Quick, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, 100)
        self.tick = "✓" if (self.console.encoding or "").lower().startswith("utf") else "*"

    def hello(self, again: bool) -> None:
        config = self.config
        runs = len(config.problems) * len(config.solvers) * len(config.nfe)
        self.console.print(
            f"{len(config.solvers)} samplers, {len(config.problems)} problems, {runs} runs on {config.device}.", end=" "
        )
        self.console.print(
            f"Replaces the earlier run in {config.out}." if again else f"Results go to {config.out}.", markup=False
        )
        self.console.print(
            "Upper number: strong error, the distance to where the exact flow ends from the same noise.\n"
            f"Lower number: sliced W2 to true data; {self.tick} = within its floor, no longer to be told from true data.",
            style="dim",
        )

    @contextmanager
    def problem(self, problem: Problem) -> Iterator[Callable[[Outcome], None]]:
        waiting = Text(f"\n{problem.title}: computing the exact end points ...")
        with Live(waiting, console=self.console, auto_refresh=False) as live:
            yield lambda outcome: live.update(self.table(outcome), refresh=True)

    def table(self, outcome: Outcome) -> Group:
        table = Table(box=box.SIMPLE_HEAD, title=Text(outcome.title, style="bold"), title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("sampler", no_wrap=True, min_width=13)
        for budget in self.config.nfe:
            table.add_column(f"NFE {budget}", justify="right", no_wrap=True, min_width=6)
        table.add_column("slope", justify="right", no_wrap=True)
        table.add_column("ms/call", justify="right", no_wrap=True)
        errors = outcome.series(ERROR)
        best = [won(errors, budget) for budget in self.config.nfe]
        leaders = [row for win in best if win is not None for row in (win.best, *win.tied)]
        for solver in self.config.solvers:
            rows = [outcome.row(solver, budget, DISTANCE) for budget in self.config.nfe]
            name = Text(solver)
            if rows[0] is not None:
                name.append(f"\n  {rows[0]['grid']}", style="dim")
            cells = [self.cell(outcome, row, leaders) for row in rows]
            trend, pace = slopes(outcome.of(solver, ERROR)), outcome.pace(solver)
            shown = Text(f"{trend[-1].value:.2f}" if trend else "")
            table.add_row(name, *cells, shown, Text("" if pace is None else f"{pace:.2f}"))
        floor, (calls, distance) = outcome.floors, outcome.reference
        caption = Text(style="dim")
        caption.append(
            f"  floor of W2 {number(floor[DISTANCE].mean)}, up to {number(floor[DISTANCE].high)}; "
            f"the exact flow: {number(distance)}\n"
        )
        caption.append(f"  end points from {calls} calls, trusted to {number(floor[ERROR].mean)}\n")
        return Group(table, caption)

    def cell(self, outcome: Outcome, row: dict[str, Any] | None, leaders: Sequence[Any]) -> Text:
        """Of one run: the strong error, bold where no other is told to be better; below it the distance to true data."""
        if row is None:
            return Text("")
        if row["nfe"] is None:
            return Text("-", style="dim")
        text = Text()
        error = outcome.row(row["solver"], row["budget"], ERROR)
        if error is not None and error["value"] is not None:
            leads = any(error is r for r in leaders)
            text.append("" if row["nfe"] == row["budget"] else f"@{row['nfe']} ", style="dim")
            text.append(number(error["value"]), style="bold green" if leads else "")
            text.append("\n")
        text.append(number(row["value"], 2), style="dim")
        text.append(self.tick if row["within_floor"] else " ", style="green")
        return text

    def goodbye(self, outcomes: Sequence[Outcome], beside: Sequence[str], seconds: float) -> None:
        from .quick import NEXT
        from .reports import PAGE

        print_ = self.console.print
        print_()
        budgets, names = milestones(self.config.nfe), called(outcomes)
        for metric, title in ((ERROR, "Least strong error"), (DISTANCE, "Closest to true data")):
            table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
            for head in (Text(title, style="bold not dim"), *(f"NFE {b}" for b in budgets)):
                table.add_column(head, min_width=18)
            for outcome in outcomes:
                wins = (won(outcome.series(metric), budget) for budget in budgets)
                table.add_row(f"  {outcome.name}", *(Text(words(win, names, most=2)) for win in wins))
            print_(table)
        print_("  = ties: not told apart by this many samples", style="dim")
        out = self.config.out
        print_(f"\n{seconds:.0f} s. Open {out / PAGE}", style="bold", markup=False, soft_wrap=True)
        print_(f"  beside it {', '.join(beside)} in {out}", style="dim", markup=False, soft_wrap=True)
        print_("Next:")
        for command in NEXT:
            print_(f"  {command}", markup=False, soft_wrap=True)
