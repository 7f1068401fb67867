"""Plant bugs in ``solvers`` one at a time and see whether the tests notice: ``python tests/mutants.py --count 60 --seed 0``.

A mutant is one small change of one expression: a sign, an operator, s for t, alpha for sigma, a constant, a comparison, an
index. Each is planted in a copy of the tree, where the tests of ``TESTS`` run until the first failure. Error messages and
type annotations are left alone. One JSON line a mutant; a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["tests/test_exact.py", "tests/test_parity.py", "tests/test_laws.py", "tests/test_orders.py", "tests/test_plan.py"]
#: The tests that are about a file, most telling first.
TESTS: dict[str, list[str]] = {
    "adaptive.py": ["tests/test_adaptive.py", "tests/test_step_control.py", "tests/test_orders.py"],
    "backends.py": ["tests/test_backends.py", "tests/test_contract.py", "tests/test_orders.py"],
    "compose.py": ["tests/test_stochastic.py", *COMMON, "tests/test_contract.py"],
    "convergence.py": ["tests/test_orders.py"],
    "dpm_v3.py": ["tests/test_dpm_v3.py", "tests/test_orders.py", "tests/test_contract.py"],
    "er_sde.py": ["tests/test_stochastic.py", *COMMON],
    "exact.py": COMMON,
    "exponential.py": ["tests/test_multistep.py", *COMMON, "tests/test_contract.py"],
    "exponential_rk.py": ["tests/test_exponential_rk.py", *COMMON],
    "exponential_tableaux.py": ["tests/test_exponential_rk.py", *COMMON],
    "few_step.py": ["tests/test_stochastic.py", *COMMON],
    "formula.py": ["tests/test_multistep.py", "tests/test_exponential_rk.py", *COMMON],
    "grids.py": ["tests/test_grids.py", "tests/test_parity.py", "tests/test_aliases.py"],
    "grids_fitted.py": ["tests/test_grids.py", "tests/test_exact.py"],
    "grids_published.py": ["tests/test_grids.py", "tests/test_parity.py", "tests/test_aliases.py"],
    "guided.py": ["tests/test_guidance.py"],
    "learned_variance.py": ["tests/test_learned_variance.py", "tests/test_adapters.py"],
    "model_statistics.py": ["tests/test_dpm_v3.py"],
    "multistep.py": ["tests/test_multistep.py", *COMMON, "tests/test_contract.py"],
    "plan.py": ["tests/test_plan.py", "tests/test_contract.py", *COMMON],
    "reversible.py": ["tests/test_reversible.py", *COMMON],
    "runge_kutta.py": ["tests/test_tableaux.py", *COMMON, "tests/test_contract.py"],
    "sampling.py": ["tests/test_sampling.py", "tests/test_contract.py", "tests/test_bad_input.py"],
    "starts.py": ["tests/test_starts_and_ends.py", "tests/test_multistep.py", *COMMON],
    "stochastic.py": ["tests/test_stochastic.py", *COMMON, "tests/test_contract.py"],
    "tableaux.py": ["tests/test_tableaux.py", *COMMON],
    "unipc.py": ["tests/test_multistep.py", *COMMON],
}
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
NAMES = {"s": "t", "t": "s"}
ATTRIBUTES = {"alpha": "sigma", "sigma": "alpha", "dalpha": "dsigma", "dsigma": "dalpha", "x0": "eps", "eps": "x0"}
CALLS = {"min": "max", "max": "min", "exp": "expm1", "expm1": "exp"}


def sites(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """(node, kind of change) for every place of a function's body that may be changed."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        if inside:
            if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
                yield node, "operator"
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                yield node, "sign"
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
                yield node, "comparison"
            elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
                yield node, "attribute"
            elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
                yield node, "name"
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
                yield node, "constant"
            elif isinstance(node, (ast.Name, ast.Attribute)) and getattr(node, "id", getattr(node, "attr", "")) in CALLS:
                yield node, "call"
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list") or (field == "args" and isinstance(node, ast.FunctionDef)):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, inside or isinstance(node, ast.FunctionDef))

    return walk(tree, False)


def change(node: ast.AST, kind: str) -> str:
    """Make the change in place; what it was and is."""
    before = ast.unparse(node)
    if isinstance(node, ast.BinOp):
        node.op = BINARY[type(node.op)]()
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Compare):
        node.ops[0] = COMPARE[type(node.ops[0])]()
    elif isinstance(node, ast.Constant):
        node.value = node.value + 1 if isinstance(node.value, int) else (node.value * 0.5 if node.value else 1.0)
    elif isinstance(node, ast.Name):
        node.id = NAMES[node.id] if kind == "name" else CALLS[node.id]
    elif isinstance(node, ast.Attribute):
        node.attr = ATTRIBUTES[node.attr] if kind == "attribute" else CALLS[node.attr]
    return f"{before}  ->  {ast.unparse(node)}"


def plan(count: int, seed: int, files: list[str]) -> list[tuple[str, int]]:
    """``count`` (file, site number) pairs, shared out among the files by how much there is to change."""
    pool = []
    for name in files:
        found = list(sites(ast.parse((ROOT / "solvers" / name).read_text())))
        pool += [(name, i) for i in range(len(found))]
    return random.Random(seed).sample(pool, min(count, len(pool)))


def mutate(name: str, number: int, tree_root: Path) -> tuple[str, int]:
    """Plant a mutant in the copy; (what changed, line)."""
    source = (ROOT / "solvers" / name).read_text()
    tree = ast.parse(source)
    node, kind = list(sites(tree))[number]
    what, line = change(node, kind), node.lineno
    (tree_root / "solvers" / name).write_text(ast.unparse(ast.fix_missing_locations(tree)))
    return what, line


def killed(name: str, tree_root: Path) -> str:
    """The first test that failed, "timeout", or "" for a survivor."""
    tests = [t for t in TESTS[name] if (tree_root / t).exists()]
    env = {**os.environ, "PYTHONPATH": str(tree_root), "OMP_NUM_THREADS": "1", "CI": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
    try:
        done = subprocess.run(command, cwd=tree_root, env=env, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:160] if lines else "could not be imported"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=[f for f in TESTS if (ROOT / "solvers" / f).exists()])
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th mutant, from the i-th")
    parser.add_argument("--output", type=Path, default=Path("out/mutants.jsonl"))
    options = parser.parse_args()
    shard, shards = map(int, options.shard.split("/"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if options.output.exists():
        done = {(r["file"], r["site"]) for r in map(json.loads, options.output.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        ignore = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
        shutil.copytree(ROOT, root, ignore=ignore)
        for name, number in plan(options.count, options.seed, options.files)[shard::shards]:
            if (name, number) in done:
                continue
            what, line = mutate(name, number, root)
            by = killed(name, root)
            shutil.copy(ROOT / "solvers" / name, root / "solvers" / name)
            row = {"file": name, "site": number, "line": line, "change": what, "killed_by": by}
            with options.output.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{name}:{line}  {what}  {by or 'survived'}", flush=True)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    print(f"{sum(bool(r['killed_by']) for r in rows)} of {len(rows)} mutants killed")


if __name__ == "__main__":
    main()
