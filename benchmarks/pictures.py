"""The two pictures beside ``quick``'s page, for slides and papers. Drawn with matplotlib's Agg, without its global state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError

from .reading import number, slopes
from .results import DISTANCE, ERROR, Outcome

PAPER, INK, QUIET = "#ffffff", "#1b1f24", "#8a9199"
# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#9a7d00", "#56b4e9", "#5b5b5b")
MARKERS = "os^DvPX"


def all_pictures(outcomes: Sequence[Outcome], budgets: Sequence[int]) -> dict[str, bytes]:
    """File name -> PNG: errors always, samples where there are pictures among the problems."""
    found = {"nfe_vs_error.png": curves(outcomes)}
    shown = [o for o in outcomes if o.kept]
    if shown:
        found["samples.png"] = samples(shown, budgets)
    return found


def figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("the pictures need matplotlib: pip install 'score-solvers[report]'") from None
    made = Figure(figsize=(width, height), facecolor=PAPER, dpi=110)
    FigureCanvasAgg(made)
    return made


def png(drawn: Any) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def curves(outcomes: Sequence[Outcome]) -> bytes:
    """Log-log against NFE: strong error with slopes above, sliced W2 and its floor below; what blows up is pinned."""
    drawn = figure(4.4 * len(outcomes) + 0.4, 8.2)
    axes = drawn.subplots(2, len(outcomes), squeeze=False)
    solvers = list(dict.fromkeys(r["solver"] for o in outcomes for r in o.rows))
    for column, outcome in enumerate(outcomes):
        for ax, key in zip(axes[:, column], (ERROR, DISTANCE), strict=True):
            _panel(ax, outcome, key, solvers)
        axes[0, column].set_title(outcome.title, color=INK, fontsize=10.5, loc="left", parse_math=False)
    axes[0, 0].set_ylabel("strong error (same noise)", color=INK)
    axes[1, 0].set_ylabel("sliced W2 to true data", color=INK)
    handles = {line.get_label(): line for ax in drawn.axes for line in ax.get_lines() if not line.get_label().startswith("_")}
    legend = drawn.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncols=min(8, len(handles)),
        frameon=False,
        labelcolor=INK,
        fontsize=10,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    drawn.subplots_adjust(left=0.075, right=0.955, top=0.955, bottom=0.105, wspace=0.24, hspace=0.16)
    return png(drawn)


def _panel(ax: Any, outcome: Outcome, key: str, solvers: Sequence[str]) -> None:
    rows, floor = outcome.series(key).rows, outcome.floors[key]
    values = [r["value"] for r in rows if r["value"] > 0.0]
    if not values:
        ax.set_axis_off()
        return
    low = min([*values, floor.mean] if key == DISTANCE else values)
    middle = sorted(values)[len(values) // 2]
    cap = max(20.0 * middle, 3.0)
    low, high = max(low, 1e-12) / 1.6, 1.5 * max(values) if max(values) < 2.0 * cap else cap
    ax.set(xscale="log", yscale="log", ylim=(low, high), facecolor=PAPER)
    labels: list[tuple[float, str, str]] = []
    pinned: dict[int, int] = {}
    for solver in solvers:
        place = solvers.index(solver)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        points = [(r["nfe"], r["value"]) for r in outcome.of(solver, key)]
        if not points:
            continue
        nfe, value = zip(*points, strict=True)
        stochastic = not outcome.of(solver, ERROR)
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
        trend = slopes(outcome.of(solver, key)) if key == ERROR else []
        if trend and value[-1] > 0.0:
            labels.append((max(value[-1], low), f"{trend[-1].value:.1f}", colour))
    _end_labels(ax, labels, low, high)
    if labels:
        ax.annotate("slope", (1.0, 1.0), xycoords="axes fraction", va="top", color=QUIET, fontsize=8.5)
    if key == DISTANCE:
        ax.axhspan(max(floor.low, low), floor.high, color=QUIET, alpha=0.22, lw=0)
        ax.axhline(floor.mean, color=QUIET, lw=1.0)
        ax.annotate("floor", (1.01, floor.mean), xycoords=("axes fraction", "data"), va="center", color=QUIET, fontsize=9)
    elif floor.mean > low:
        ax.axhline(floor.mean, color=QUIET, lw=1.0, ls=":")
    ticks = sorted({r["nfe"] for r in rows} & {r["budget"] for r in rows})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_xlim(ticks[0] / 1.12, ticks[-1] * 1.22) if ticks else None
    ax.minorticks_off()
    ax.set_xlabel("network calls", color=INK)
    ax.tick_params(colors=INK, labelsize=9)
    ax.grid(True, which="major", color=QUIET, alpha=0.22, lw=0.6)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=QUIET)


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


def samples(outcomes: Sequence[Outcome], budgets: Sequence[int]) -> bytes:
    """For each problem of pictures: a grid by its best sampler at the largest budget, and the same noise at every budget."""
    drawn = figure(5.6 * len(outcomes), 9.6)
    axes = drawn.subplots(3, len(outcomes), squeeze=False, height_ratios=(8, 6.3, 6.3))
    for column, outcome in enumerate(outcomes):
        key = ERROR if outcome.series(ERROR).rows else DISTANCE
        ranked = outcome.ranked(max(budgets), key)
        if not ranked:
            continue
        top = ranked[0]
        _show(axes[0, column], tile(outcome.kept[top, max(budgets)], 6))
        title = f"{outcome.title}\n{top}, NFE {max(budgets)}"
        axes[0, column].set_title(title, color=INK, fontsize=11, loc="left", parse_math=False)
        middle = outcome.ranked(budgets[len(budgets) // 2], key)
        for ax, solver in zip(axes[1:, column], dict.fromkeys([*middle[:1], *middle[-1:]]), strict=False):
            _strip(ax, outcome, solver, budgets)
    for ax in drawn.axes:
        ax.set_axis_off()
    drawn.subplots_adjust(left=0.045, right=0.985, top=0.945, bottom=0.012, wspace=0.1, hspace=0.1)
    return png(drawn)


def _strip(ax: Any, outcome: Outcome, solver: str, budgets: Sequence[int]) -> None:
    """The first samples of a sampler, a row a budget."""
    rows = {}
    for budget in budgets:
        row = outcome.row(solver, budget, DISTANCE)
        if row is not None and (solver, budget) in outcome.kept:
            rows.setdefault(row["nfe"], outcome.kept[solver, budget][:10])
    _show(ax, tile(torch.cat(list(rows.values())), 10))
    title = f"the same noise with more network calls: {solver}"
    ax.set_title(title, color=INK, fontsize=10, loc="left", parse_math=False)
    ax.set_ylim(10 * len(budgets) - 2.5, -0.5)  # one scale, also where a sampler has fewer rows
    for i, nfe in enumerate(rows):
        place = (-1.5, 10 * i + 3.5)
        ax.annotate(str(nfe), place, ha="right", va="center", color=INK, fontsize=9, annotation_clip=False)


def _show(ax: Any, picture: Tensor) -> None:
    page, paper, ink = (_rgb(c) for c in (PAPER, "#f3f4f6", INK))
    shade = picture[..., None]
    ax.imshow(torch.where(shade.isnan(), page, paper + (ink - paper) * shade).numpy(), interpolation="nearest")


def _rgb(colour: str) -> Tensor:
    """#rrggbb as three numbers in [0, 1]."""
    return torch.tensor([int(colour[i : i + 2], 16) / 255.0 for i in (1, 3, 5)])
