"""Import rules: a module imports only modules of lower layers and of its own package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "mmdistill"
# From the lowest to the highest layer. Entries of one layer do not import each other.
LAYERS = (
    ("errors",),
    ("console", "plugins", "randomness"),
    ("files",),
    ("data", "models"),
    ("modalities",),
    ("config",),
    ("distributed",),
    ("checkpoint",),
    ("demo", "fewshot", "prepare"),
    ("builders",),
    ("training",),
    ("distill", "evaluation", "pretrain"),
    ("workflows",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, also inside functions: ``a.b`` for ``mmdistill.a.b``.

    Imports under ``if TYPE_CHECKING`` do not count.
    """
    tree = ast.parse(path.read_text())
    hidden = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("mmdistill")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmdistill":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = module_path(name) is not None
                found.add(name if is_module else str(node.module))
    return {name.removeprefix("mmdistill").removeprefix(".") for name in found}


def module_path(name: str) -> Path | None:
    """The file of a dotted module name; None if there is no such module."""
    stem = PACKAGE.joinpath(*name.split(".")[1:])
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def module_name(path: Path) -> str:
    """``checkpoint.load`` for src/mmdistill/checkpoint/load.py; a package is named without ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_and_package_has_a_layer() -> None:
    names = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert names - {"__init__", "__main__"} == set(RANK)


def test_at_most_six_loose_modules() -> None:
    loose = [p.name for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__")]
    assert len(loose) <= 6, loose


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = module_name(path).split(".")[0]
    upward = [
        name
        for name in imported_modules(path)
        if name and own in RANK and name.split(".")[0] != own and RANK[name.split(".")[0]] >= RANK[own]
    ]
    assert not upward, f"{module_name(path)} imports {', '.join(sorted(upward))}, which are not in a lower layer"


def test_no_import_cycle() -> None:
    graph = {module_name(path): imported_modules(path) - {module_name(path)} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            if other:
                visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_unit_tests_mirror_the_package() -> None:
    unit = Path(__file__).parent
    tests = {path.relative_to(unit) for path in unit.rglob("test_*.py")}
    sources = {path.relative_to(PACKAGE) for path in MODULES if path.stem not in ("__init__", "__main__")}
    expected = {path.with_name(f"test_{path.name}") for path in sources}
    assert not expected - tests, "modules without a unit test"
    about_the_whole_package = {Path("test_architecture.py"), Path("test_private_interfaces.py")}
    assert not tests - expected - about_the_whole_package, "unit tests without a module"
