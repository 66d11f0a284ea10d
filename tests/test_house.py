"""The house stands as its plan says; every list here is derived from the tree."""

import ast
import graphlib
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

import bthooks

PACKAGE = Path(bthooks.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imported(name: str) -> set[str]:
    """Our own modules that a module imports."""
    found = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = package.split(".") if package else []
        base = ".".join(parts[: len(parts) - node.level + 1])
        module = ".".join(filter(None, (base, node.module or "")))
        for alias in node.names:
            inner = f"{module}.{alias.name}".lstrip(".")
            found.add(inner if inner in FILES else module)
    assert found <= FILES.keys(), (name, found - FILES.keys())
    return found


def test_no_import_goes_in_a_circle():
    graph = {name: imported(name) for name in FILES if name != "__init__"}
    assert graph["measure.gradients"]
    graphlib.TopologicalSorter(graph).prepare()


def test_every_wing_is_in_the_wheel():
    root = PACKAGE.parent
    wings = {".".join(file.parent.relative_to(root).parts) for file in FILES.values()}
    setuptools = read_configuration(root / "pyproject.toml")["tool"]["setuptools"]
    assert wings <= set(setuptools["packages"])
    assert "bthooks.measure" in wings
    assert setuptools["package-data"] == {"bthooks": ["py.typed"]}
    assert (PACKAGE / "py.typed").exists()
