"""The architecture, held to by a look at every import statement."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ostap_parallel"
NAME = PACKAGE.name
FILES = sorted(PACKAGE.rglob("*.py"))

# From top to bottom; a module may import from its own line and from those below.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"futures", "joblib", "pools"},
    {"faces"},
    {"runs"},
    {"engine"},
    {"supply"},
    {"config"},
    {"worker"},
    {"errors"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

MAX_FUNCTION_LINES = 60
# Lines of code. What is larger is not read in an afternoon, and not in one piece.
MAX_LINES = 9950
MAX_FILE_LINES = 400
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

# What runs on bare hosts gets there with these, and what users' tasks derive from needs nothing.
STANDARD = sys.stdlib_module_names
ALLOWED = {"worker": {"cloudpickle", "dill", "ppft", f"{NAME}.worker", f"{NAME}.errors"}}
OPTIONAL = {"numpy", "joblib"}  # in functions that make do without


def module_of(file: Path) -> str:
    """Return the dotted name that `file` is imported by."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, depth: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """Yield each node that runs, and how many functions it is in."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:
                yield other, depth
                yield from statements(other, depth)
            continue
        yield child, depth
        inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from statements(child, depth + inner)


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the dotted names that `file` imports, and the depth in functions of each."""
    for node, depth in statements(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, depth
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{base_of(node, file)}.{alias.name}", depth
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == NAME:
            yield f"{NAME}.{node.attr}", depth  # loads it, as the package is lazy


def base_of(node: ast.ImportFrom, file: Path) -> str:
    """Return the dotted name behind ``from``, with leading dots resolved."""
    if not node.level:
        return str(node.module)
    package = file.relative_to(PACKAGE.parent).parts[: -node.level]
    return ".".join([*package, *filter(None, [node.module])])


def layer(module: str) -> str:
    """Return ``supply`` for ``ostap_parallel.supply.ssh``; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def is_ours(module: str) -> bool:
    return module.split(".")[0] == NAME


def upward(file: Path) -> Iterator[str]:
    """Yield the imports of `file` that go up."""
    own = layer(module_of(file))
    for module, depth in imports(file):
        target = layer(module)
        if not is_ours(module) or (target.startswith("__") and target != "__main__"):
            continue  # the package's __file__ and the like are no module
        if own == "":  # the package itself: workers import it too, so it may load nothing at once
            if depth == 0:
                yield f"{module} while ostap_parallel is imported"
        elif target and RANK.get(target, -1) < RANK[own]:  # a public name knows the whole package
            yield module


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_downward(file):
    own = layer(module_of(file))
    assert own == "" or own in RANK, f"{own} has no layer: give it one in LAYERS"
    assert list(upward(file)) == []


@pytest.mark.parametrize(
    "file", [file for file in FILES if layer(module_of(file)) in ALLOWED], ids=module_of
)
def test_the_far_side_needs_little(file):
    allowed = ALLOWED[layer(module_of(file))]
    for module, depth in imports(file):
        first, *others = module.split(".")
        if first not in STANDARD and not (depth and first in OPTIONAL):
            prefixes = {first, ".".join([first, *others[:1]])}
            assert prefixes & allowed, f"{module} is not there on a bare host"


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("supply/x.py", "from ostap_parallel.engine import parallel", 1),
        ("supply/x.py", "def f():\n    import ostap_parallel.cli", 1),
        ("supply/x.py", "try:\n    from ..manager import WorkManager\nexcept E:\n    pass", 1),
        ("supply/x.py", "from .. import WorkManager", 1),
        ("supply/x.py", "import ostap_parallel\nostap_parallel.WorkManager()", 1),
        ("supply/x.py", "import ostap_parallel\nprint(ostap_parallel.__file__)", 0),
        ("supply/x.py", "from . import y\nfrom ..config import z\nfrom ..errors import E", 0),
        ("supply/__init__.py", "from .ssh import Session\nfrom ..errors import HostError", 0),
        ("supply/x.py", "if TYPE_CHECKING:\n    from ostap_parallel.cli import main", 0),
        ("__init__.py", "from .manager import WorkManager", 1),
        ("__init__.py", "def __getattr__(name):\n    from .manager import WorkManager", 0),
    ],
)
def test_the_check_sees_an_upward_import(tmp_path, monkeypatch, path, text, found):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / NAME)
    file = tmp_path / NAME / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    assert len(list(upward(file))) == found


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_functions_are_short(file):
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long


def code_lines(file: Path) -> int:
    """Count the lines that hold code: neither blank nor comment nor docstring."""
    text = file.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_package_is_small():
    lines = {module_of(file): code_lines(file) for file in FILES}
    assert sum(lines.values()) < MAX_LINES, lines
    assert max(lines.values()) <= MAX_FILE_LINES, lines


def test_importing_the_package_loads_nothing_heavy():
    heavy = {"pathos", "ppft", "dill", "rich", "numpy", "multiprocess"}
    script = f"import sys, ostap_parallel; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert (done.stdout.split(), done.stderr) == ([], "")
