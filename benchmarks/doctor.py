"""``python -m benchmarks doctor``: what is installed here, on which device, and whether it computes what it should.

The self-test takes seconds and needs nothing but torch: published words of the random generator, the exact law of a sampler on
Gaussian data, the order of a sampler, the counting of calls, and an error where a network returns NaN.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import torch

from scores import Gaussian, Score
from sde import EDM, VP
from sde.errors import InputError, NetworkError
from sde.noise import White
from solvers import exact_law, sample, trace
from solvers.grids import log_snr

from . import peers

PROJECT = "score-solvers"
#: What the package cannot do without, where it is run from a folder and was never installed.
CORE = ("torch", "numpy", "torchdiffeq", "torchsde", "tqdm")


@dataclass(frozen=True)
class Doctor:
    """Versions, device, extras, threads, and a self-test of some seconds. 0: all is well; 1: something computes wrongly."""

    peers: bool = False
    """Import the other libraries too, to see whether their lines run here. Some take seconds."""


class Check(NamedTuple):
    """A part of the self-test: what it found, in words; ``good``: whether that is right."""

    name: str
    good: bool
    said: str
    seconds: float


def run(config: Doctor) -> int:
    """Print all of it, and the verdict last. 0: well, 1: a check failed or a package that is needed is missing."""
    for title, lines in (("machine", machine()), ("packages", packages())):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    if config.peers:
        print("libraries as lines of a sweep\n" + "\n".join(f"  {line}" for line in libraries()))
    print("self-test")
    found = self_test()
    for check in found:
        print(f"  {'ok  ' if check.good else 'FAIL'} {check.name}: {check.said} ({check.seconds:.1f} s)")
    wrong = [check.name for check in found if not check.good]
    absent = [name for name in wanted()[""] if version(name) is None]
    if wrong or absent:
        parts = [f"failed: {', '.join(wrong)}"] * bool(wrong) + [f"missing: {', '.join(absent)}"] * bool(absent)
        print(f"verdict: NOT WELL; {'; '.join(parts)}. Do not trust numbers of this machine.")
        return 1
    print(f"verdict: well; {len(found)} of {len(found)} checks passed in {sum(c.seconds for c in found):.1f} s")
    return 0


# --- what there is ------------------------------------------------------------------------------------------------------------


def machine() -> list[str]:
    """Python, system, processor, devices, threads."""
    lines = [
        f"python {platform.python_version()} ({platform.system()} {platform.machine()})",
        f"cores {os.cpu_count()}, torch threads {torch.get_num_threads()}, "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i} {card.name}, {card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}")
        lines.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        lines.append(f"no CUDA device ({'torch was built without CUDA' if torch.version.cuda is None else 'none is seen'})")
    return lines


def packages() -> list[str]:
    """A line an extra: what of it is here, and how to get the rest; and a torchvision that does not fit this torch."""
    lines = []
    for extra, names in wanted().items():
        found = {name: version(name) for name in names}
        absent = [name for name, has in found.items() if has is None]
        here = ", ".join(f"{name} {has}" for name, has in found.items() if has is not None) or "nothing"
        install = f"pip install '{PROJECT}[{extra}]'" if extra else f"pip install {PROJECT}"
        lines.append(f"{extra or 'core'}: {here}" + (f"; missing {', '.join(absent)}: {install}" if absent else ""))
    broken = torchvision_fault()
    if broken:
        lines.append(
            f"torchvision does not import ({broken}): libraries that import it fail; install the build that fits torch"
        )
    return lines


def wanted() -> dict[str, tuple[str, ...]]:
    """extra ("": none) -> the packages it brings, as the installed project declares them; without that of developers."""
    try:
        declared = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return {"": CORE}
    found: dict[str, list[str]] = {"": []}
    for line in declared:
        need, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        name = re.match(r"[A-Za-z0-9._-]+", need.strip())
        if name is not None and name[0] != PROJECT:
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return {extra: tuple(names) for extra, names in found.items() if extra != "dev"}


def version(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torchvision_fault() -> str | None:
    """Why an installed torchvision cannot be imported; None where it can, or is not there."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch raises RuntimeError, or OSError
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def libraries() -> list[str]:
    """A line a library of ``benchmarks.peers``."""
    lines = []
    for name in peers.LIBRARIES:
        found = peers.library(name)
        why = found.missing()
        count = len(found.samplers)
        lines.append(f"{name}: not here ({why})" if why else f"{name} {found.version}: {count} samplers")
    return lines


# --- the self-test ------------------------------------------------------------------------------------------------------------


def self_test() -> list[Check]:
    """All checks; one that raises has failed, and the others are still made."""
    checks = {
        "random words": random_words,
        "normals": normals,
        "exact law": law,
        "order": order,
        "calls": calls,
        "NaN": not_a_number,
    }
    found = []
    for name, check in checks.items():
        began = time.perf_counter()
        try:
            good, said = check()
        except Exception as error:  # whatever is broken here is what this is for
            good, said = False, f"{type(error).__name__}: {str(error)[:200]}"
        found.append(Check(name, good, said, time.perf_counter() - began))
    return found


#: (counter, key, words) of Philox4x64-10: the known answers published with Random123.
KNOWN_WORDS = (
    ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    (
        ((1 << 64) - 1,) * 4,
        ((1 << 64) - 1,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
)


def random_words() -> tuple[bool, str]:
    """numpy's Philox, from which all noise is made."""
    from numpy.random import Philox

    def words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
        # numpy counts up before it draws
        number = sum(word << (64 * i) for i, word in enumerate(counter)) - 1
        before = [(number >> (64 * i)) & ((1 << 64) - 1) for i in range(4)]
        return tuple(int(w) for w in Philox(counter=before, key=list(key)).random_raw(4))

    wrong = [counter for counter, key, known in KNOWN_WORDS if words(counter, key) != known]
    return not wrong, f"{len(KNOWN_WORDS) - len(wrong)} of {len(KNOWN_WORDS)} published answers of Philox4x64-10"


def normals() -> tuple[bool, str]:
    """Sample i is a function of (seed, i): not of its batch; and what comes out is a unit normal."""
    whole = White(7).initial((4096, 8), torch.float64)
    some = White(7, indices=[5, 17, 4095]).initial((3, 8), torch.float64)
    same = bool((whole[[5, 17, 4095]] == some).all())
    n, mean, variance = whole.numel(), float(whole.mean()), float(whole.var())
    # five standard errors of each
    unit = abs(mean) < 5.0 / math.sqrt(n) and abs(variance - 1.0) < 5.0 * math.sqrt(2.0 / n)
    return same and unit, f"batch-independent: {same}; mean {mean:.4f}, variance {variance:.4f} of {n}"


def law() -> tuple[bool, str]:
    """The exact law of a sampler's table on N(0, s^2) against the product of its steps' factors."""
    path, s = VP(), 0.5
    gaussian = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=torch.tensor([s * s], dtype=torch.float64))
    plan = trace("ddim", path, log_snr(path, 20))
    found = exact_law(plan, gaussian, start="prior")
    # DDIM on N(0, s^2): one factor a step, x <- (alpha_t k + sigma_t e) x with x0 = k x, eps = e x
    gain = 1.0
    knots = path.knots(log_snr(path, 20))
    for a, b in itertools.pairwise(knots):
        total = a.alpha**2 * s * s + a.sigma**2
        gain *= b.alpha * a.alpha * s * s / total + b.sigma * a.sigma / total
    wanted = abs(abs(gain) * path.prior_std() - s)  # W2 of two centred Gaussians: the difference of their deviations
    off = abs(float(found.w2()) - wanted)
    return off < 1e-12, f"W2 of ddim, 20 steps: {float(found.w2()):.6e}, closed form {wanted:.6e}"


def order() -> tuple[bool, str]:
    """dpmpp_2m on a Gaussian has order 2: twice the steps, a quarter of the error."""
    path = EDM()
    gaussian = Gaussian(path, torch.zeros(2, dtype=torch.float64), var=torch.tensor([0.25, 1.0], dtype=torch.float64))
    x = 80.0 * White(1).initial((16, 2), torch.float64)
    truth = gaussian.flow(x, 80.0, 0.002)
    off = [
        float((sample(gaussian, x=x, solver="dpmpp_2m", steps=n, start=80.0, stop=0.002).x - truth).norm()) for n in (128, 256)
    ]
    slope = math.log2(off[0] / off[1])
    return 1.8 < slope < 2.2, f"dpmpp_2m, slope {slope:.3f} between 128 and 256 steps"


def calls() -> tuple[bool, str]:
    """What is reported is what the network has counted."""
    counted = 0

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal counted
        counted += 1
        return 0.5 * x

    out = sample(Score(network, VP(), predicts="eps"), shape=(2, 3), solver="heun", nfe=11, seed=0)
    return out.nfe == counted <= 11, f"heun with nfe=11: {counted} calls, {out.nfe} reported"


def not_a_number() -> tuple[bool, str]:
    """A NaN from the network is an error that says where, not a sample."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.where(t.reshape(-1, 1) < 0.5, torch.nan, x)

    try:
        sample(Score(network, VP(), predicts="eps"), shape=(2, 3), solver="ddim", nfe=8, seed=0)
    except NetworkError as error:
        return error.step is not None, f"told with its step and time ({error.step}, {error.t})"
    except InputError as error:
        return False, f"told as something else: {error}"
    return False, "a sample with NaN came back without an error"


if __name__ == "__main__":
    sys.exit(run(Doctor()))
