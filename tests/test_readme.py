"""The README tells the truth: its code runs, its table is the catalogue's, its commands exist; imports keep the arrows of
the layout.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path as File

import pytest

from benchmarks import orders
from benchmarks.__main__ import COMMANDS
from benchmarks.samplers import with_table
from solvers import GRIDS, SOLVERS

ROOT = File(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_blocks_run_in_order(capsys):
    scope: dict[str, object] = {}
    code = blocks("python")
    assert len(code) >= 3
    for block in code:
        exec(compile(block, "README.md", "exec"), scope)  # noqa: S102
    assert "torch.Size([64, 2])" in capsys.readouterr().out


def test_the_page_on_adding_a_sampler_adds_samplers(monkeypatch, capsys):
    """Its rows run and their orders are as declared, with no test changed for them."""
    text = (ROOT / "docs" / "adding_a_sampler.md").read_text(encoding="utf-8")
    known, scope = dict(SOLVERS), dict[str, object]()
    try:
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(block, "adding_a_sampler.md", "exec"), scope)  # noqa: S102
        added = set(SOLVERS) - set(known)
        assert len(added) == 3
        assert all(orders.measure(name, "ode", "VP").deviation <= orders.TOLERANCE for name in added)
    finally:
        SOLVERS.clear()
        SOLVERS.update(known)
    assert len(re.findall(r"^\w+ 2\.0 (2\.0|2\.01|1\.99) ", capsys.readouterr().out, flags=re.MULTILINE)) == 3


def test_the_table_is_the_catalogue():
    assert with_table(README) == README, "run: python -m benchmarks samplers --write"


def test_every_command_of_the_readme_exists():
    named = set(re.findall(r"python -m benchmarks (\w+)", README))
    assert named <= set(COMMANDS)
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"quick", "test"}
    assert all(re.search(rf"^{t}:", makefile, flags=re.MULTILINE) for t in targets)


def test_every_sampler_and_grid_named_in_the_readme_exists():
    named = set(re.findall(r'solver="(\w+)"', README)) | set(re.findall(r'trace\("(\w+)"', README))
    assert named <= set(SOLVERS)
    assert set(re.findall(r'grid="(\w+)"', README)) <= set(GRIDS)


ALLOWED = {
    "sde": {"sde", "torch", "numpy", "torchdiffeq"},
    # typing_extensions, torch's own dependency, for types alone; scipy where a diffusers configuration needs it there too
    "scores": {"scores", "sde", "torch", "numpy", "typing_extensions", "scipy"},
    "solvers": {"solvers", "sde", "torch", "numpy", "torchdiffeq", "torchsde", "tqdm", "hypothesis", "diffusers"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package):
    """sde <- scores, sde <- solvers, all <- benchmarks; the core imports torch, torchdiffeq, torchsde, numpy and tqdm alone."""
    import sys

    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in ALLOWED[package] or top in sys.stdlib_module_names, f"{file.name} imports {name}"


def test_importing_the_core_is_light():
    """No plotting, no benchmark library, no solver back end is imported with the packages."""
    import subprocess
    import sys

    heavy = ("matplotlib", "sklearn", "torchsde", "torchdiffeq", "diffusers", "scipy", "tyro")
    code = f"import sys, sde, scores, solvers; print(' '.join(m for m in {heavy} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == ""
