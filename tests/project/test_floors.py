"""Floors of docs/architecture.md: a room imports only from floors below it, and no modules import each other, lazily or not."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = (
    "errors version",
    "environment files",
    "terminal",
    "formats",
    "inputs",
    "suite frames",
    "bundle",
    "model",
    "quantize vision decode",
    "inference",
    "regress",
    "export",
    "calibrate sensitivity bench",
    "run chat watch serve inspect build doctor",
    "cli",
    "__main__",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def imported(file: Path) -> set[str]:
    """Return the full names that a module imports, at module level or inside functions."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_point_down() -> None:
    upwards = []
    for file in sorted((ROOT / "cobra_edge").rglob("*.py")):
        room = file.relative_to(ROOT / "cobra_edge").with_suffix("").parts[0]
        if room == "__init__":
            continue  # the public API may import from any floor
        others = {name.split(".")[1] for name in imported(file) if name.startswith("cobra_edge.")} & FLOOR.keys()
        upwards += [f"{file.relative_to(ROOT)} imports {o}" for o in others - {room} if FLOOR[o] >= FLOOR[room]]
    assert not upwards, "\n".join(upwards)


def first_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules of an import cycle, the first one repeated at the end; empty without a cycle.

    Args:
        imports: {module: names it imports, as `imported` gives them}.
    """

    def module_of(name: str) -> str:
        while name and name not in imports:
            name = name.rpartition(".")[0]
        return name

    edges = {module: {module_of(name) for name in names} - {module, ""} for module, names in imports.items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other() -> None:
    imports = {}
    for file in (ROOT / "cobra_edge").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        imports[name] = imported(file)
    cycle = first_cycle(imports)
    assert not cycle, " -> ".join(cycle)


def test_a_cycle_is_found() -> None:
    assert first_cycle({"p.a": {"p.b.name"}, "p.b": {"os", "p.c"}, "p.c": set()}) == []
    assert set(first_cycle({"p.a": {"p.b.name"}, "p.b": {"p.c"}, "p.c": {"p.a"}})) == {"p.a", "p.b", "p.c"}


def test_every_room_has_its_floor() -> None:
    package = ROOT / "cobra_edge"
    rooms = {file.relative_to(package).with_suffix("").parts[0] for file in package.rglob("*.py")}
    assert rooms - {"__init__"} == FLOOR.keys()


def test_the_package_needs_no_laboratory() -> None:
    for file in (ROOT / "cobra_edge").rglob("*.py"):
        assert not [name for name in imported(file) if name.split(".")[0] in ("bench", "calibration", "tests")], file
