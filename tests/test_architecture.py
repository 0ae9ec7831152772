"""What the design promises of the source: who imports whom, what is forbidden, how long things may be."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "sycoca").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
SOURCES = [*LIBRARY, *TOOLS]

LEAVES = {"types", "config", "distributed", "log", "generation", "similarity"}
ALLOWED = {
    "types": set(),
    "config": {"types"},
    "distributed": {"types"},
    "log": {"types"},
    "generation": {"types", "config"},
    "similarity": set(),
    "cli": {"types", "config", "distributed", "log"},
    "results": {"types", "config"},
    "data": LEAVES,
    "models": LEAVES,
    "objectives": {*LEAVES, "models"},
    "evaluation": {*LEAVES, "data"},
    "pretrained": {*LEAVES, "data", "models"},
    "train": {*LEAVES, "data", "models", "objectives", "evaluation", "pretrained"},
    "captioners": {*LEAVES, "data", "models", "pretrained"},
    "doctor": {*LEAVES, "data", "models", "objectives", "train"},
    "finetune": {*LEAVES, "data", "models", "objectives", "train", "evaluation", "pretrained", "captioners"},
}
"""Which parts of the package a part may import, besides itself."""

MAX_FILE, MAX_TOOL, MAX_FUNCTION, MAX_PARAMETERS = 300, 60, 50, 7
FORBIDDEN_NAMES = re.compile(r"utils|helpers|Manager", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef
by_path = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in the file; `from a import b` counts as a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, Function))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "sycoca").parts[0].removesuffix(".py")


def test_every_part_of_the_package_has_a_place_in_the_order():
    assert {part_of(path) for path in LIBRARY} - {"__init__"} <= ALLOWED.keys()


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_downwards(path: Path):
    if path == ROOT / "sycoca" / "__init__.py":
        return
    part = part_of(path)
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("sycoca.")}
    assert ours <= ALLOWED[part] | {part}


@by_path
def test_nothing_imports_tools_or_tests(path: Path):
    assert not {name for name in imported(path) if name.split(".")[0] in ("tools", "tests", "benchmarks")}


@by_path
def test_only_one_file_talks_to_other_ranks(path: Path):
    names = {name for name in imported(path) if name.startswith(("torch.distributed", "deepspeed.comm"))}
    uses = {dotted(node) for node in ast.walk(parse(path)) if dotted(node).startswith("torch.distributed")}
    assert path.name == "distributed.py" or not names | uses


@by_path
def test_the_device_is_never_chosen_with_cuda(path: Path):
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "cuda"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_reads_no_arguments_and_no_environment(path: Path):
    if path in (ROOT / "sycoca/train/engine.py", ROOT / "sycoca/cli.py"):  # how the process was launched; what tools share
        return
    forbidden = {"os.environ", "os.environb", "os.getenv", "os.putenv", "sys.argv", "os.environ.get"}
    assert not {dotted(node) for node in ast.walk(parse(path))} & forbidden
    assert not set(imported(path)) & forbidden


@by_path
def test_files_are_short(path: Path):
    limit = MAX_TOOL if path in TOOLS else MAX_FILE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@by_path
def test_functions_are_short_and_take_few_parameters(path: Path):
    for function in functions(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{function.name} has {length} lines"
        arguments = function.args
        names = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        num = len([name for name in names if name not in ("self", "cls")])
        assert num <= MAX_PARAMETERS, f"{function.name} takes {num} parameters"


@by_path
def test_names_say_something(path: Path):
    defined = [node.name for node in ast.walk(parse(path)) if isinstance(node, Function | ast.ClassDef)]
    assert not [name for name in (path.stem, path.parent.name, *defined) if FORBIDDEN_NAMES.search(name)]


@by_path
def test_every_module_has_a_docstring(path: Path):
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_and_class_has_a_docstring(path: Path):
    public = [node for node in parse(path).body if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_every_package_folder_is_a_package():
    folders = {path.parent for path in LIBRARY}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.slow
def test_every_tool_and_benchmark_answers_help():
    scripts = [*TOOLS, *sorted((ROOT / "benchmarks").glob("*.py"))]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    script = (
        "import runpy, sys\n"
        "for tool in sys.argv[1:]:\n"
        "    sys.argv = [tool, '--help']\n"
        "    try:\n"
        "        runpy.run_path(tool, run_name='__main__')\n"
        "    except SystemExit as ended:\n"
        "        assert not ended.code, (tool, ended.code)\n"
    )
    command = [sys.executable, "-c", script, *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(scripts) > len(TOOLS)
    for tool in TOOLS:
        assert f"usage: {tool.name}" in done.stdout


@pytest.mark.slow
def test_a_tool_starts_without_libraries_that_few_runs_need():
    """They took two of seven seconds of every process that was launched."""
    heavy = {"open_clip", "transformers", "deepspeed", "matplotlib", "pandas", "faiss"}
    script = f"import sys, sycoca.train.pretrain; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "set()\n"


def test_the_readme_s_tree_is_true():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, tree = readme.partition("## What is where")
    tree = tree.partition("\n## ")[0]
    if "@TREE@" in tree or not tree:
        pytest.skip("README.md has no tree yet")
    folders = ("sycoca", "tools", "benchmarks", "configs", "launch")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and "__" not in str(path)]
    assert [str(path) for path in files if not re.search(rf"\b{re.escape(path.stem)}\b", tree)] == []
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert [name for name in re.findall(r"\w+\.py\b", tree) if name not in names] == []
