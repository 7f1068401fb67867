"""What ``quick`` says on the terminal: a table that fills in, then what won and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .problems import Problem
from .results import Outcome, Row, closest, last_slope, milestones, number, winner

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
        for solver in self.config.solvers:
            rows = outcome.of(solver)
            name = Text(solver)
            if rows:
                name.append(f"\n  {rows[0].grid}", style="dim")
            cells = [self.cell(outcome, row) for row in rows] + [Text("")] * (len(self.config.nfe) - len(rows))
            table.add_row(name, *cells, self.slope(rows), self.pace(rows))
        floor, gap = outcome.floor, outcome.reference_w2
        caption = Text(style="dim")
        caption.append(
            f"  floor of W2 {number(floor.mean)} +- {number(floor.sd)} a block; the exact flow: {number(gap.mean)}\n"
        )
        caption.append(f"  end points from {outcome.reference_nfe} calls, trusted to {number(outcome.reference_error)}\n")
        return Group(table, caption)

    def cell(self, outcome: Outcome, row: Row) -> Text:
        if row.nfe is None:
            return Text("-", style="dim")
        text = Text()
        if row.error is not None:
            leads = outcome.best(row.budget, "error") is row
            bought = "" if row.nfe == row.budget else f"@{row.nfe} "
            text.append(bought, style="dim")
            text.append(number(row.error), style="bold green" if leads else "")
            text.append("\n")
        text.append(number(row.sliced_w2, 2), style="dim")
        text.append(self.tick if row.within_floor else " ", style="green")
        return text

    def slope(self, rows: Sequence[Row]) -> Text:
        value = last_slope(rows)
        return Text("" if value is None else f"{value:.2f}")

    def pace(self, rows: Sequence[Row]) -> Text:
        spent = sum(r.seconds or 0.0 for r in rows)
        calls = sum(r.nfe or 0 for r in rows)
        return Text(f"{1e3 * spent / calls:.2f}" if calls else "")

    def goodbye(self, outcomes: Sequence[Outcome], beside: Sequence[str], seconds: float) -> None:
        print_ = self.console.print
        print_()
        budgets = milestones(self.config.nfe)
        for say, words in ((winner, "Least strong error"), (closest, "Closest to true data")):
            table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
            for head in (Text(words, style="bold not dim"), *(f"NFE {b}" for b in budgets)):
                table.add_column(head, min_width=18)
            for outcome in outcomes:
                table.add_row(f"  {outcome.name}", *(say(outcome, b) for b in budgets))
            print_(table)
        out = self.config.out
        print_(f"\n{seconds:.0f} s. Open {out / 'report.html'}", style="bold", markup=False, soft_wrap=True)
        print_(f"  beside it {', '.join(beside)} in {out}", style="dim", markup=False, soft_wrap=True)
        print_("Next:")
        print_("  python -m benchmarks quick --solvers ddim heun unipc_2 --nfe 10 20 40", markup=False, soft_wrap=True)
        print_(
            "  python -m benchmarks train digits       train the network of the third problem yourself",
            markup=False,
            soft_wrap=True,
        )
        print_("  python -m benchmarks exact --help       exact error laws on Gaussian data", markup=False, soft_wrap=True)
