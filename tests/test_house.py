"""The house stands as its plan says; every list here is derived from the tree."""

import ast
import graphlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
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


# Which wing may import from which. Each also imports from the ground: the modules at the root that
# any of them does, and that import nothing of ours.
RULE = {
    "measure": {"measure"},
    "health": {"health", "measure"},
    "capture": {"capture", "measure"},
    "record": {"record", "measure", "health"},
}


def wing(name: str) -> str:
    """The wing that a module is in; "" at the root."""
    return name if (PACKAGE / name).is_dir() else name.rpartition(".")[0]


def test_imports_follow_the_data():
    assert {wing(name) for name in FILES} - {""} == RULE.keys()
    ground = {i for name in FILES if wing(name) for i in imported(name) if not wing(i)}
    assert {name for name in ground if imported(name)} == set()
    for name in FILES:
        if own := wing(name):
            assert {wing(i) for i in imported(name)} - {""} <= RULE[own], name


@pytest.mark.parametrize("name", sorted(name for name in FILES if wing(name) == "measure"))
def test_what_computes_needs_torch_alone(name):
    nodes = list(ast.walk(ast.parse(FILES[name].read_text())))
    others = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    others |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    assert {other.partition(".")[0] for other in others} <= sys.stdlib_module_names | {"torch"}


# The names that a NamedTuple has for its users.
NAMED_TUPLE = {name for name in dir(NamedTuple("Any", [("x", int)])) if name.startswith("_")}
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "getattr_static", "attrgetter"}
BY_NAME |= {"methodcaller", "import_module"}
ROOMS = {"torch_private", "record.backend"}  # of torch's private names, of the two backends'


def private(code: str) -> list[str]:
    """The private names that `code` touches on others than itself."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names: list[object] = []
        if isinstance(node, ast.Attribute):
            if getattr(node.value, "id", None) not in ("self", "cls"):
                names = [node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call | ast.Subscript):
            called = node.func if isinstance(node, ast.Call) else node.value
            called = called.func if isinstance(called, ast.Call) else called  # vars(x)["_name"]
            by = getattr(called, "id", None) or getattr(called, "attr", None)
            if by in (BY_NAME if isinstance(node, ast.Call) else {"vars", "__dict__"}):
                given = node.args if isinstance(node, ast.Call) else [node.slice]
                names = [getattr(argument, "value", None) for argument in given]
        parts = [part for name in names if isinstance(name, str) for part in name.split(".")]
        found += [part for part in parts if re.match("_[^_]", part) and part not in NAMED_TUPLE]
    return found


@pytest.mark.parametrize("name", sorted(FILES.keys() - ROOMS))
def test_what_is_private_is_touched_in_its_room(name):
    assert private(FILES[name].read_text()) == []


def test_the_rooms_are_needed():
    for name in ROOMS:
        assert private(FILES[name].read_text()), name


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("torch._C._is_tracing()", ["_is_tracing", "_C"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("from torch._ops import OpOverload", ["_ops"]),
        ("from torch.utils import _pytree as tree", ["_pytree"]),
        ("getattr(module, '_version', None)", ["_version"]),
        ("operator.attrgetter('_C._is_tracing')", ["_C", "_is_tracing"]),
        ("vars(module)['_modules']; module.__dict__['_buffers']", ["_modules", "_buffers"]),
        ("hook._call.x = 1", ["_call"]),
        ("self._own; cls._own; pair._replace(x=1); module.__class__; _own()", []),
        ("from .names import tag; vars(given)['name']; given['_name']", []),
    ],
)
def test_the_scan_finds_what_is_private(code, names):
    assert sorted(private(code)) == sorted(names)
