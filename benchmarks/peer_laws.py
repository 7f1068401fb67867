"""The table "law" of ``python -m benchmarks peers``: stochastic samplers on Gaussian data, exactly.

Ours by their tables (``solvers.exact_law``), other libraries' by impulses through their own loops (``peers.impulses``): the law
of the output is known without Monte Carlo, so nothing here has an error bar.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sde.errors import ToolkitError

from . import problems
from .lines import resolve_line
from .metrics.gaussian import Exactly
from .peers.impulses import exact_w2
from .peers.line import PeerLine

CELLS = ("gauss64:vp", "gauss64:ve")

#: (line, grid). noise=white where the tree gives the same law: normals of steps that do not overlap are independent.
LINES = (
    ("ddpm", "karras"),
    ("euler_ancestral", "karras"),
    ("dpmpp_2m_sde", "log_snr"),
    ("dpmpp_3m_sde", "log_snr"),
    ("er_sde_3", "log_snr"),
    ("seeds_3", "log_snr"),
    ("sa_solver", "log_snr"),
    ("exponential_euler_sde", "log_snr"),
    ("azula/Ito", "karras"),
    ("azula/Ito", "log_snr"),
    ("azula/DDPM", "karras"),
    ("k_diffusion/euler_ancestral", "karras"),
    ("k_diffusion/dpmpp_2m_sde:noise=white", "log_snr"),
    ("k_diffusion/dpmpp_2m_sde:noise=white", "karras"),
    ("k_diffusion/dpmpp_2m_sde:noise=white,solver_type=heun", "karras"),
    ("k_diffusion/dpmpp_3m_sde:noise=white", "log_snr"),
    ("k_diffusion/dpmpp_sde", "karras"),
    ("diffusers/DDPM", "uniform"),
    ("diffusers/DPMSolverMultistep3:algorithm_type=sde-dpmsolver++", "log_snr"),
    ("diffusers/SASolver", "uniform"),
    ("edm/edm:S_churn=40", "karras"),
    ("torchsde/euler", "log_snr"),
    ("torchsde/heun", "log_snr"),
)


class Law(NamedTuple):
    """W2 / sqrt(d), in standard deviations, between a line's output and the truth where it stops; ``nfe``: its calls."""

    cell: str
    budget: int
    line: str
    grid: str
    nfe: int
    w2: float


def laws(cell: str, pairs: Sequence[tuple[str, str]], budgets: Sequence[int], refused: set[str]) -> Iterator[Law]:
    """Every line at every budget that buys a step of it; what the others said goes into ``refused``."""
    problem = problems.get(cell)
    for text, grid in pairs:
        line = resolve_line(text)
        for nfe in budgets:
            try:
                if isinstance(line, PeerLine):
                    w2, spent = exact_w2(line, problem, nfe, grid)
                else:
                    w2, spent = Exactly("w2").exact(problem, line.name, nfe=nfe, grid=grid, law="marginal"), nfe
            except ToolkitError as error:
                refused.add(f"{text} {grid}: {error}")
                continue
            yield Law(cell, nfe, text, grid, spent, w2)


def table(found: Sequence[Law], budgets: Sequence[int]) -> str:
    """As Markdown: a line a row, both noises side by side."""
    values = {(law.line, law.grid, law.cell, law.budget): f"{law.w2:.1e}" for law in found}
    cells = list(dict.fromkeys(law.cell for law in found))
    columns = [(cell, nfe) for cell in cells for nfe in budgets]
    rows = [
        f"| {line} {grid} | " + " | ".join(values.get((line, grid, *column), "-") for column in columns) + " |"
        for line, grid in dict.fromkeys((law.line, law.grid) for law in found)
    ]
    head = "| sampler | " + " | ".join(f"{cell} {nfe}" for cell, nfe in columns) + " |\n" + "|---" * (1 + len(columns)) + "|"
    return "\n".join(["**Stochastic samplers on Gaussian data: exact W2 / sqrt(d), in standard deviations**", "", head, *rows])
