"""What SECURITY.md promises is tested, and the code has no other way to run what is in a file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sde", "scores", "solvers", "benchmarks")
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ATTACKS = {row[0]: row[1] for row in re.findall(r"^\| (A\d+) \|.*\| ([^|]*) \|$", TEXT, flags=re.MULTILINE)}

#: Modules that run what they read, or hand it to something that does.
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "ctypes",
    "code",
    "runpy",
}
#: Calls by their written name; of a name with a dot the last parts count.
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.package.PackageImporter"}
#: Where names become modules: names that are in the code, of commands and of the libraries that samplers are compared with;
#: and what the caller writes on the command line (``--model module:function``, which no file may say).
DYNAMIC = {
    "benchmarks/__main__.py",
    "benchmarks/speed.py",
    "benchmarks/models.py",
    "benchmarks/doctor.py",
    "benchmarks/peers/__init__.py",
    "benchmarks/peers/base.py",
    "benchmarks/peers/diff_sampler.py",
    "benchmarks/peers/k_diffusion.py",
}


def faults(source: str, file: str = "x.py") -> Iterator[str]:
    """What of a file could run more than the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names += [f"{node.module}.{a.name}" for a in node.names]
            if not (isinstance(node, ast.ImportFrom) and node.level):
                yield from (f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in MODULES or n == "torch.hub")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.hub":
            yield f"{node.lineno}: torch.hub"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else k.value for k in node.keywords}
            yield from (f"{node.lineno}: {fault}" for fault in _call_faults(name, words, file))


def _call_faults(name: str, words: dict[str | None, object], file: str) -> Iterator[str]:
    if name in CALLS or name.removeprefix("builtins.") in CALLS:
        yield f"calls {name}"
    if name == "torch.load" and words.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and words.get("allow_pickle", False) is not False:
        yield f"{name} that may unpickle"
    for word in ("trust_remote_code", "shell", "allow_pickle"):
        if words.get(word, False) is not False:
            yield f"{name} with {word}"
    if words.get("weights_only", True) is not True:
        yield f"{name} with weights_only={words['weights_only']}"
    if name.endswith("import_module") and file not in DYNAMIC:
        yield f"calls {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_code_of_ours_can_run_a_file(package: str) -> None:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if bad := list(faults(path.read_text(encoding="utf-8"), name)):
            found[name] = bad
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import dill",
        "from yaml import load",
        "import joblib.numpy_pickle",
        "import torch.hub",
        "from torch import hub\nfrom torch.hub import load",
        "import ctypes.util",
        "eval('1')",
        "exec(text)",
        "import builtins\nbuiltins.eval('1')",
        "compile(x, 'f', 'exec')",
        "__import__('os')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "torch.load(f, None, None, weights_only=0)",
        "torch.hub.load('a', 'b')",
        "torch.jit.load(f)",
        "load = torch.hub.load",
        "np.load(f, allow_pickle=True)",
        "numpy.load(f, allow_pickle=x)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
        "os.popen(c)",
        "Model.from_pretrained(n, trust_remote_code=True)",
        "importlib.import_module(name)",
    ],
)
def test_the_lint_sees(line: str) -> None:
    assert list(faults(line))


@pytest.mark.parametrize(
    "line",
    [
        "import pickletools",
        "from .code import x",
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=False)",
        "np.load(f)",
        "subprocess.run(['a'])",
        "re.compile('a')",
        "torch.compile(f)",
        "network.eval()",
        "model.eval",
    ],
)
def test_the_lint_accuses_nobody(line: str) -> None:
    assert list(faults(line)) == []


def test_every_attack_has_its_tests() -> None:
    """The numbers of SECURITY.md are A1, A2, ...; each names tests that exist; those of the files are those of hostile.py."""
    assert list(ATTACKS) == [f"A{i + 1}" for i in range(len(ATTACKS))]
    assert len(ATTACKS) == 13
    tree = ast.parse((ROOT / "tests" / "test_checkpoint.py").read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    by_files = set()
    for attack, names in ATTACKS.items():
        named = set(re.findall(r"`(\w+)`", names))
        assert named, attack
        assert named <= tests, f"{attack}: {named - tests}"
        if "test_hostile_files" in named:
            by_files.add(attack)
    counts = dict.fromkeys(by_files, 0)
    for file in hostile.hostile(Path("/nowhere")):
        counts[file.attack] = counts.get(file.attack, 0) + 1
    assert set(counts) == by_files
    assert min(counts.values()) >= 9
    assert sum(counts.values()) >= 300


def test_the_caps_are_those_of_the_page() -> None:
    from scores import safetensors_file, stack_machine

    caps = (safetensors_file.HEADER_CAP // 2**20, f"{safetensors_file.TENSOR_CAP:,}", f"{stack_machine.OPERATION_CAP:,}")
    assert "{} MiB of header, {} tensors, {} instructions".format(*caps) in " ".join(TEXT.split())
