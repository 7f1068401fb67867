"""What ``scores.check`` says: the names of mistakes, a finding, a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Every name of a finding.
MISTAKES: dict[str, str] = {
    "time reversed": "the network's time runs the other way",
    "factor 1000 missing": "the network counts time in steps of a table of about 1000, and is given t in [0, 1]",
    "factor 1000 superfluous": "the network takes t in [0, 1], and is given steps",
    "time label truncated": "the label is, or is made by the network, a whole number, and most of the time is lost",
    "wrong time label": "the network knows the noise level by another number than it is given",
    "input scaling missing": "the network wants c_in x, and is given x",
    "input scaling superfluous": "the network scales its input itself, or wants it as it is",
    "wrong input scaling": "the network wants another c_in",
    "wrong path": "the network was trained on another path (alpha, sigma) of the same time",
    "output mixed up": "the network predicts something else than it is taken for",
    "negated output": "minus the output is what it is taken for",
    "wrong sigma_data": "the network's preconditioning has another sigma_data",
    "another family": "path, label and scaling are all those of another family of networks",
    "wrong data range": "the data are not in the range that the network was trained on",
    "wrong latent scale": "the latents are not multiplied by the factor that the network was trained with",
    "data do not fit": "the wiring agrees with itself, but not with the data",
    "2C output not split": "the network returns twice the channels, the second half being its variance",
    "condition missing": "the network wants a condition that it is not given",
    "wrong null label": "the class that stands for no class is another",
    "call fails": "the network cannot be called, or returns something that cannot be used",
    "train mode": "dropout or batch normalisation is in train mode",
    "not deterministic": "the same input twice gives different outputs",
    "rows influence each other": "the output of one sample depends on the other samples of the batch",
    "half-precision overflow": "a half-precision network returns inf or nan",
    "not finite": "the network returns inf or nan",
    "output ignores x": "the output is the same whatever the input is",
    "output ignores t": "the output is the same whatever the time label is",
    "inconsistent prediction": "alpha x0 + sigma eps is not x, or the score is not -eps / sigma",
    "does not denoise": "the network is no better than a linear filter, however it is wired: untrained, or for other data",
    "unexplained": "the network denoises, but worse than its own output allows, and no known mistake explains it",
}


@dataclass(frozen=True)
class Finding:
    """A likely mistake: its ``name``, a key of ``MISTAKES``; the ``evidence`` in numbers; the line to ``change``."""

    name: str
    evidence: str
    change: str

    def __str__(self) -> str:
        return f"{self.name}: {MISTAKES[self.name]}\n   seen     {self.evidence}\n   change   {self.change}"


class Measured(NamedTuple):
    """One noise level of the wiring as given; the errors are squared errors of x0 over that of a linear filter of x."""

    ratio: float  # sigma / alpha
    error: float  # of the wiring
    affine: float  # of the best affine map of the same input and output


@dataclass(frozen=True)
class Diagnosis:
    """What ``check`` found; ``str()`` is a short report.

    findings  likely mistakes, the one that explains most first
    notes     what could not be told, and what is no mistake but worth knowing
    levels    the numbers of the wiring as given, on the data or, without any, on the network's own samples
    calls     network calls made
    """

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    levels: tuple[Measured, ...] = ()
    calls: int = 0

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        count = len(self.findings)
        head = "nothing wrong was found" if self.ok else f"{count} finding{'s' if count > 1 else ''}"
        lines = [f"check: {head} ({self.calls} network calls)"]
        lines += [f"{i}. {finding}" for i, finding in enumerate(self.findings, 1)]
        if self.levels:
            lines.append("sigma/alpha                " + "".join(f"{m.ratio:9.3g}" for m in self.levels))
            lines.append("squared error, as wired    " + "".join(f"{m.error:9.3g}" for m in self.levels))
            lines.append("  at best, affine in output" + "".join(f"{m.affine:9.3g}" for m in self.levels))
            lines.append("  (1 is what a linear filter of x reaches)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.2g}" if math.isfinite(v) else "inf" for v in values)
