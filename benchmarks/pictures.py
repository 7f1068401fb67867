"""The two pictures of ``quick``, each for light and for dark pages. Drawn with matplotlib's Agg, without its global state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde.errors import InputError

from .results import Outcome, last_slope, number


class Picture(NamedTuple):
    """PNG bytes for a light and a dark page, and the words for who cannot see them."""

    light: bytes
    dark: bytes
    alt: str


class Theme(NamedTuple):
    page: str
    ink: str
    quiet: str
    lines: tuple[str, ...]


# Okabe and Ito's colours, told apart by colour-blind readers, and lighter ones for dark pages.
LIGHT = Theme("#ffffff", "#1b1f24", "#8a9199", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#9a7d00", "#56b4e9", "#5b5b5b"))
DARK = Theme("#14171a", "#e6e8ea", "#7d858d", ("#4aa8e0", "#ff8c42", "#2fcf9f", "#e39ac4", "#e0c341", "#9bd8ff", "#b5b5b5"))
MARKERS = "os^DvPX"


def all_pictures(outcomes: Sequence[Outcome], budgets: Sequence[int]) -> dict[str, Picture]:
    """File name -> picture: errors always, samples where there are pictures among the problems."""
    words = (
        "Strong error and sliced W2 against network calls, a line a sampler, a column a problem; the tables hold the numbers."
    )
    found = {"nfe_vs_error.png": Picture(curves(outcomes, LIGHT), curves(outcomes, DARK), words)}
    shown = [o for o in outcomes if o.kept]
    if shown:
        words = "Grids of generated digits, and below them the same noise taken to data with more and more network calls."
        found["samples.png"] = Picture(samples(shown, budgets, LIGHT), samples(shown, budgets, DARK), words)
    return found


def figure(width: float, height: float, theme: Theme) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("the pictures need matplotlib: pip install 'score-solvers[report]'") from None
    made = Figure(figsize=(width, height), facecolor=theme.page, dpi=110)
    FigureCanvasAgg(made)
    return made


def png(drawn: Any, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", facecolor=theme.page, metadata={"Software": None})
    return buffer.getvalue()


def curves(outcomes: Sequence[Outcome], theme: Theme) -> bytes:
    """Log-log against NFE: strong error with slopes above, sliced W2 and its floor below; what blows up is pinned."""
    drawn = figure(4.4 * len(outcomes) + 0.4, 8.2, theme)
    axes = drawn.subplots(2, len(outcomes), squeeze=False)
    solvers = list(dict.fromkeys(r.solver for o in outcomes for r in o.rows))
    for column, outcome in enumerate(outcomes):
        for ax, key in zip(axes[:, column], ("error", "sliced_w2"), strict=True):
            _panel(ax, outcome, key, solvers, theme)
        axes[0, column].set_title(outcome.title, color=theme.ink, fontsize=10.5, loc="left", parse_math=False)
    axes[0, 0].set_ylabel("strong error (same noise)", color=theme.ink)
    axes[1, 0].set_ylabel("sliced W2 to true data", color=theme.ink)
    handles = {line.get_label(): line for ax in drawn.axes for line in ax.get_lines() if not line.get_label().startswith("_")}
    legend = drawn.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncols=min(8, len(handles)),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=10,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    drawn.subplots_adjust(left=0.075, right=0.955, top=0.955, bottom=0.105, wspace=0.24, hspace=0.16)
    return png(drawn, theme)


def _panel(ax: Any, outcome: Outcome, key: str, solvers: Sequence[str], theme: Theme) -> None:
    rows = [r for r in outcome.rows if r.nfe is not None and getattr(r, key) is not None]
    values = [getattr(r, key) for r in rows if getattr(r, key) > 0.0]
    floor = outcome.floor
    if not values:
        ax.set_axis_off()
        return
    low = min([*values, floor.mean - 2 * floor.sd] if key == "sliced_w2" else values)
    middle = sorted(values)[len(values) // 2]
    low, high = max(low, 1e-12) / 1.6, min(max(values) * 1.5, max(20.0 * middle, 3.0))
    ax.set(xscale="log", yscale="log", ylim=(low, high), facecolor=theme.page)
    labels: list[tuple[float, str, str]] = []
    pinned: dict[int, int] = {}
    for solver in solvers:
        place = solvers.index(solver)
        colour, marker = theme.lines[place % len(theme.lines)], MARKERS[place % len(MARKERS)]
        points = list({r.nfe: getattr(r, key) for r in rows if r.solver == solver and r.nfe is not None}.items())
        if not points:
            continue
        stochastic = all(r.error is None for r in outcome.of(solver))
        nfe, value = zip(*points, strict=True)
        ax.plot(nfe, value, color=colour, marker=marker, ms=4.5, lw=1.5, ls="--" if stochastic else "-", label=solver)
        for at, v in points:
            if v > high:
                level = pinned.get(at, 0)
                pinned[at] = level + 1
                ax.plot([at], [high], marker="^", color=colour, ms=6, clip_on=False, zorder=5)
                ax.annotate(
                    number(v, 2),
                    (at, high),
                    xytext=(6, -9 - 10 * level),
                    textcoords="offset points",
                    color=colour,
                    fontsize=7.5,
                )
        trend = last_slope(outcome.of(solver)) if key == "error" else None
        if trend is not None and value[-1] > 0.0:
            labels.append((max(value[-1], low), f"{trend:.1f}", colour))
    _end_labels(ax, labels, low, high)
    if labels:
        ax.annotate("slope", (1.0, 1.0), xycoords="axes fraction", va="top", color=theme.quiet, fontsize=8.5)
    if key == "sliced_w2":
        ax.axhspan(max(floor.mean - 2 * floor.sd, low), floor.mean + 2 * floor.sd, color=theme.quiet, alpha=0.22, lw=0)
        ax.axhline(floor.mean, color=theme.quiet, lw=1.0)
        ax.annotate("floor", (1.01, floor.mean), xycoords=("axes fraction", "data"), va="center", color=theme.quiet, fontsize=9)
    elif outcome.reference_error > low:
        ax.axhline(outcome.reference_error, color=theme.quiet, lw=1.0, ls=":")
    ticks = sorted({r.nfe for r in rows if r.nfe is not None} & {r.budget for r in rows})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_xlim(ticks[0] / 1.12, ticks[-1] * 1.22) if ticks else None
    ax.minorticks_off()
    ax.set_xlabel("network calls", color=theme.ink)
    ax.tick_params(colors=theme.ink, labelsize=9)
    ax.grid(True, which="major", color=theme.quiet, alpha=0.22, lw=0.6)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=theme.quiet)


def _end_labels(ax: Any, labels: list[tuple[float, str, str]], low: float, high: float) -> None:
    """Slopes at the right edge, moved apart so that none covers another."""
    apart, last = (math.log(high) - math.log(low)) * 0.042, -math.inf
    for value, text, colour in sorted(labels):
        y = max(math.log(value), last + apart)
        last = y
        ax.annotate(
            text,
            (1.0, math.exp(y)),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )


def tile(x: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Pictures (n, 1, h, w) in [-1, 1] as one picture in [0, 1], row by row, with gaps of nan between."""
    rows = math.ceil(len(x) / columns)
    ink = torch.full((rows * columns, *x.shape[-2:]), math.nan)
    ink[: len(x)] = (x[:, 0].clamp(-1.0, 1.0) + 1.0) / 2.0
    padded = torch.nn.functional.pad(ink, (0, gap, 0, gap), value=math.nan)
    h, w = padded.shape[-2:]
    return padded.reshape(rows, columns, h, w).transpose(1, 2).reshape(rows * h, columns * w)[:-gap, :-gap]


def samples(outcomes: Sequence[Outcome], budgets: Sequence[int], theme: Theme) -> bytes:
    """For each problem of pictures: a grid by its best sampler at the largest budget, and the same noise at every budget."""
    drawn = figure(5.6 * len(outcomes), 10.4, theme)
    axes = drawn.subplots(3, len(outcomes), squeeze=False, height_ratios=(10, 6.3, 6.3))
    for column, outcome in enumerate(outcomes):
        top = outcome.best(max(budgets), "error") or outcome.best(max(budgets), "sliced_w2")
        if top is None:
            continue
        _show(axes[0, column], tile(outcome.kept[top.solver, top.budget], 10), theme)
        axes[0, column].set_title(
            f"{outcome.title}\n{top.solver}, NFE {top.nfe}", color=theme.ink, fontsize=11, loc="left", parse_math=False
        )
        for ax, solver in zip(axes[1:, column], _contrast(outcome, budgets), strict=False):
            rows = list({r.nfe: r for r in outcome.of(solver) if (solver, r.budget) in outcome.kept}.values())
            _show(ax, tile(torch.cat([outcome.kept[solver, r.budget][:10] for r in rows]), 10), theme)
            ax.set_title(
                f"the same noise with more network calls: {solver}", color=theme.ink, fontsize=10, loc="left", parse_math=False
            )
            ax.set_ylim(10 * len(budgets) - 2.5, -0.5)  # one scale, also where a sampler has fewer rows
            for i, row in enumerate(rows):
                ax.annotate(
                    str(row.nfe),
                    (-1.5, 10 * i + 3.5),
                    ha="right",
                    va="center",
                    color=theme.ink,
                    fontsize=9,
                    annotation_clip=False,
                )
    for ax in drawn.axes:
        ax.set_axis_off()
    drawn.subplots_adjust(left=0.045, right=0.985, top=0.945, bottom=0.012, wspace=0.1, hspace=0.1)
    return png(drawn, theme)


def _contrast(outcome: Outcome, budgets: Sequence[int]) -> list[str]:
    """The best and the worst sampler of the flow in the middle of the budgets (of all samplers where none is of the flow)."""
    middle = budgets[len(budgets) // 2]
    key = "error" if any(r.error is not None for r in outcome.rows) else "sliced_w2"
    rows = sorted(
        (r for r in outcome.rows if r.budget == middle and getattr(r, key) is not None), key=lambda r: getattr(r, key)
    )
    return [rows[0].solver, rows[-1].solver][: len(rows)] if rows else []


def _show(ax: Any, picture: Tensor, theme: Theme) -> None:
    page, paper, ink = (_rgb(c) for c in (theme.page, "#f3f4f6" if theme is LIGHT else "#20252b", theme.ink))
    shade = picture[..., None]
    ax.imshow(torch.where(shade.isnan(), page, paper + (ink - paper) * shade).numpy(), interpolation="nearest")


def _rgb(colour: str) -> Tensor:
    """#rrggbb as three numbers in [0, 1]."""
    return torch.tensor([int(colour[i : i + 2], 16) / 255.0 for i in (1, 3, 5)])
