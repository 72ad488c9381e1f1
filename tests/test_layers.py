"""The architecture, held to by a look at every import statement.

One in a function counts, and so does one under ``TYPE_CHECKING``: there is no way around. Only the
package itself, whose public names are loaded when they are used, and the modules of the root,
which are doors to faces, know what is above others.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ostap_parallel"
NAME = PACKAGE.name
FILES = sorted(PACKAGE.rglob("*.py"))

# The floors, from top to bottom: a module may import from its own line and from those below.
LAYERS = (
    {"__main__", "cli", "core", "futures", "hosts", "joblib", "pools", "profile"},
    {"batch", "commands", "ostap", "pipeline"},
    {"faces"},
    {"arrays", "runs"},
    {"engine", "views"},
    {"supply"},
    {"config", "machine", "schedulers"},
    {"worker"},
    {"objects"},
    {"errors", "lending", "libraries", "logs", "root"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MAX_FLOORS = 10
MAX_DEPTH = 9  # modules of a room that import one another in a row

# The modules of each room that others may import. Those of the root are for users only.
DOORS = {
    "cli": {""},
    "batch": {""},
    "commands": {
        *(
            "blocks",
            "command",
            "core",
            "halting",
            "host",
            "inputs",
            "logfacts",
            "running",
            "template",
            "transfer",
        ),
        "",
    },
    "pipeline": {"", "datamap", "recipe"},
    "ostap": {"", "options"},
    "faces": {"executor", "joblib", "launch", "manager", "pathos_pool", "pool", "scoop"},
    "runs": {
        *(
            "calls",
            "checkpoint",
            "checks",
            "display",
            "dump",
            "identity",
            "ordering",
            "outcome",
            "past",
            "placed",
            "profiles",
            "progress",
            "recorder",
        ),
        *(
            "reading",
            "report",
            "run",
            "shapes",
            "snapshot",
            "speculation",
            "stream",
            "tails",
            "tally",
            "task",
            "trust",
        ),
    },
    "arrays": {"account", "backend", "layout", "run", "settings", "summary"},
    "views": {
        "groups",
        "inline",
        "live",
        "page",
        "picture",
        "screen",
        "timeline",
        "trace",
        "words",
    },
    "engine": {"backend", "core", "engine", "foreign", "future", "names", "retries"},
    "schedulers": {"directives", "quantities", "scheduler", "sge", "slurm"},
    "supply": {
        *("entries", "here", "host", "private", "source", "sources", "ssh", "steps"),
        *("supervisor", "syncing", "ways"),
    },
    "config": {"", "batch", "entries", "files", "host", "hostlist", "load", "requests"},
    "machine": {
        *("channel", "cpus", "crew", "endpoint", "forked", "handle", "handshake", "jobs"),
        *("loop", "output"),
        *("serve", "server", "templates", "usage", "wire"),
        "",
    },
    "worker": {
        "listening",
        *("batch", "calls", "chunk", "command", "control", "execute", "far", "files"),
        *(
            "initializer",
            "launched",
            "modes",
            "modules",
            "mux",
            "nested",
            "node",
            "printed",
            "processes",
            "profiling",
            "reaper",
        ),
        *("shared", "standin", "tasks", "template", "transport"),
        "",
    },
    "objects": {
        "aside",
        "borrowing",
        "byvalue",
        "kinds",
        "lending",
        "program",
        "serialize",
        "settings",
    },
    "lending": {"borrower", "lender"},
    "errors": {""},
    "libraries": {""},
    "logs": {""},
    "root": {""},
}

MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 400  # of code: what is longer is not read in one piece
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
FAR_SIDE = {
    f"{NAME}.{room}"
    for room in ("machine", "worker", "objects", "lending", "errors", "libraries", "logs", "root")
}
ALLOWED = {
    "machine": {"ppft", *FAR_SIDE},
    "worker": {"dill", "ppft", *FAR_SIDE},
    "objects": {"cloudpickle", *FAR_SIDE},
    "root": FAR_SIDE,
    "lending": FAR_SIDE,
    "libraries": FAR_SIDE,
}
OPTIONAL = {"numpy", "joblib"}  # in functions that make do without


def module_of(file: Path) -> str:
    """Return the dotted name that `file` is imported by."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def statements(node: ast.AST, depth: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """Yield each node, and how many functions it is in."""
    for child in ast.iter_child_nodes(node):
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


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def upward(file: Path) -> Iterator[str]:
    """Yield the imports of `file` that go up."""
    own = layer(module_of(file))
    for module, depth in imports(file):
        target = layer(module)
        if not is_ours(module) or (target.startswith("__") and target != "__main__"):
            continue  # the package's __file__ and the like are no module
        if own == "":  # the package itself: workers import it too, so it may load nothing at once
            if depth == 0 and module not in names_for_checkers(file):
                yield f"{module} while ostap_parallel is imported"
        elif target and RANK.get(target, -1) < RANK[own]:  # a public name knows the whole package
            yield module


def names_for_checkers(file: Path) -> set[str]:
    """Return what a file imports under ``TYPE_CHECKING``."""
    blocks = [node for node in ast.walk(ast.parse(file.read_text())) if is_type_checking(node)]
    nodes = [node for block in blocks for node in ast.walk(block)]
    return {
        f"{base_of(node, file)}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@functools.cache
def graph() -> dict[str, set[str]]:
    """Return the modules that each module of the package imports, but for the package itself."""
    names = {module_of(file) for file in FILES} - {NAME}
    found: dict[str, set[str]] = {}
    for file in FILES:
        own = module_of(file)
        if own in names:
            found[own] = {known(module, names) for module, _ in imports(file)} - {"", own}
    return found


def known(name: str, modules: set[str]) -> str:
    """Return the module that a dotted name is in, or is; empty if it is none of them."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def longest(arrows: dict[str, set[str]], begin: str, above: tuple[str, ...] = ()) -> list[str]:
    """Return the longest chain of imports that begins with a module; fail if one is a cycle."""
    path = (*above, begin)
    assert begin not in above, f"a cycle of imports: {path}"
    chains = (longest(arrows, module, path) for module in arrows[begin])
    return [begin, *max(chains, key=len, default=[])]


def test_there_are_few_floors():
    assert len(LAYERS) <= MAX_FLOORS


@pytest.mark.slow
def test_no_modules_import_each_other():
    arrows = graph()
    ends: set[str] = set()
    while found := {name for name, below in arrows.items() if name not in ends and below <= ends}:
        ends |= found
    assert arrows.keys() <= ends, f"cycles: {sorted(arrows.keys() - ends)}"


@pytest.mark.parametrize("room", DOORS)
def test_a_room_is_not_deep(room):
    inside = {name: below for name, below in graph().items() if layer(name) == room}
    inside = {name: below & inside.keys() for name, below in inside.items()}
    chains = [longest(inside, name) for name in inside]
    assert max(map(len, chains)) <= MAX_DEPTH, max(chains, key=len)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_rooms_are_entered_by_their_doors(file):
    own = module_of(file)
    if own == NAME:
        return
    for module in graph()[own]:
        _, room, *inner = module.split(".")
        if room != layer(own):
            assert ".".join(inner) in DOORS[room], f"{module} is no door"


def test_modules_of_the_root_are_doors_only():
    for name in ("futures", "hosts", "joblib", "pools"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        kinds = (ast.Expr, ast.ImportFrom, ast.Assign)
        assert all(isinstance(node, kinds) for node in tree.body), name
        rooms = {layer(module) for module, _ in imports(PACKAGE / f"{name}.py")}
        assert rooms in ({"faces"}, {"commands"})


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
        ("supply/x.py", "if TYPE_CHECKING:\n    from ostap_parallel.cli import main", 1),
        ("__init__.py", "from .manager import WorkManager", 1),
        ("__init__.py", "if TYPE_CHECKING:\n    from .manager import WorkManager", 0),
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
        node.name: length_of(node)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and length_of(node) > MAX_FUNCTION_LINES
    }
    assert not long


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function but for its docstring."""
    lines = function.end_lineno - function.lineno + 1
    match function.body[0]:
        case ast.Expr(value=ast.Constant(value=str())) as text:
            lines -= text.end_lineno - text.lineno + 1
    return lines


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


@pytest.mark.slow
def test_files_are_short():
    lines = {module_of(file): code_lines(file) for file in FILES}
    assert max(lines.values()) <= MAX_FILE_LINES, lines


def lines_of_rooms() -> dict[str, int]:
    """Return the lines of code of each room; the modules of the root are one."""
    lines: dict[str, int] = {}
    for file in FILES:
        room = layer(module_of(file))
        room = room if (PACKAGE / room).is_dir() and room else "modules at the top"
        lines[room] = lines.get(room, 0) + code_lines(file)
    return lines


@pytest.mark.slow
def test_contributing_tells_how_large_each_room_is():
    """A tenth more or less is as it is written there; who adds more writes it anew, and why."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    told = {
        name: int(count) for name, count in re.findall(r"\| `?([a-z ]+)`? \| (\d+) (?=\|)", text)
    }
    lines = lines_of_rooms()
    lines["all"] = sum(lines.values())
    assert told.keys() == lines.keys()
    assert told == {room: pytest.approx(count, rel=0.1, abs=20) for room, count in lines.items()}


def main() -> None:
    """Print the lines of code of each room, and the arrows between modules."""
    lines = lines_of_rooms()
    for room, count in sorted(lines.items()):
        print(f"{count:6} {room}")
    print(f"{sum(lines.values()):6} all, {sum(map(len, graph().values()))} arrows")


if __name__ == "__main__":
    main()


def test_importing_the_package_loads_nothing_heavy():
    heavy = {"pathos", "ppft", "dill", "rich", "numpy", "multiprocess"}
    script = f"import sys, ostap_parallel; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert (done.stdout.split(), done.stderr) == ([], "")
