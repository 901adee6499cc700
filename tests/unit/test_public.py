"""Tests of the tests: every public function and method of the package is called by some test.

The names are read from the sources, so that nothing has to be registered.  What the package exports
must be used by a test itself: ``vm.map(...)``, ``getattr(vm, "map")``, a function that is passed
on, a method that a test's subclass defines.  Any other public function may also be called by a
function of the package that is reached from a test.  Two methods of one name are one name here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

#: Generated; and the suite itself, which is not the package's API.
NOT_OURS = ("cdefs", "_suite")
#: Their ``__all__`` is what the package exports.
EXPORTS = ("__init__.py", "private/__init__.py", "guest/__init__.py", "guest/linux/__init__.py")
#: Called by name, by a program of others.
HOOKS = ("pytest_", "do_", "visit_")


class Definition(NamedTuple):
    """A function or a method, and the names that its body uses."""

    where: str
    name: str
    owner: str
    uses: frozenset[str]

    @property
    def public(self) -> bool:
        return not any(part.startswith("_") for part in (self.name, self.owner) if part)


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that code uses, other than in an import or in a definition."""
    used: set[str] = set()
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)  # getattr(vm, "map")
    return used


def read_package(package: Path) -> tuple[list[Definition], set[str]]:
    """All functions and methods of a package, and the names used outside of them."""
    definitions: list[Definition] = []
    outside: set[str] = set()

    def walk(body: list[ast.stmt], path: str, owner: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path}: {owner}{'.' if owner else ''}{node.name}"
                used = frozenset(names_in(node.body))
                definitions.append(Definition(where, node.name, owner, used))
                outside.update(names_in(node.decorator_list))
            elif isinstance(node, ast.ClassDef):
                walk(node.body, path, node.name)
            elif not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"):
                outside.update(names_in([node]))

    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.parts[0] not in NOT_OURS:
            walk(ast.parse(path.read_text()).body, relative.as_posix(), "")
    return definitions, outside


def exported(package: Path) -> set[str]:
    """The names in the ``__all__`` of the package and of its public parts."""
    names: set[str] = set()
    for name in EXPORTS:
        if not (package / name).exists():
            continue
        for node in ast.parse((package / name).read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names.update(ast.literal_eval(node.value))
    return names


def used_by_tests(tests: Path) -> set[str]:
    """The names that the tests use, and those of the methods that their classes define."""
    used: set[str] = set()
    for path in tests.rglob("*.py"):
        tree = ast.parse(path.read_text())
        used |= names_in([tree])
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                used |= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return used


def untested(package: Path, tests: Path) -> Iterator[str]:
    """Where public functions and methods are defined that no test calls."""
    definitions, outside = read_package(package)
    direct = used_by_tests(tests)
    reached = direct | outside
    waiting = definitions
    while True:
        now = [one for one in waiting if _is_called(one, reached)]
        if not now:
            break
        waiting = [one for one in waiting if not _is_called(one, reached)]
        for one in now:
            reached |= one.uses
    api = exported(package)
    for one in definitions:
        if not one.public or one.name.startswith(HOOKS):
            continue
        needed = direct if (one.owner or one.name) in api else reached
        if one.name not in needed:
            yield one.where


def _is_called(one: Definition, reached: set[str]) -> bool:
    if one.name.startswith("__") or one.name.startswith(HOOKS):
        return not one.owner or one.owner in reached  # by Python itself
    return one.name in reached


def test_every_public_function_and_method_is_called_by_a_test() -> None:
    package = ROOT / "kvmpriv"
    names = {one.name for one in read_package(package)[0] if one.public}
    assert {"map", "create_vcpu", "convert", "declare"} <= names
    assert {"Vm", "Vcpu", "declare", "PrivateAbi"} <= exported(package)
    missing = sorted(untested(package, ROOT / "tests"))
    assert not missing, "no test calls these:\n" + "\n".join(missing)


def test_a_function_without_a_test_is_found(tmp_path: Path) -> None:
    """The twin of each: the same function is not reported once a test uses its name."""
    package, tests = tmp_path / "package", tmp_path / "tests"
    for folder in (package / "inner", tests):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text("__all__ = ['Thing']\n")
    (package / "inner" / "one.py").write_text(
        "class Thing:\n"
        "    def used(self): helper()\n"
        "    def through_another(self): ...\n"
        "    def forgotten(self): ...\n"
        "    def _private(self): ...\n"
        "class Tool:\n"
        "    def dead(self): dead_too()\n"
        "    def lively(self): ...\n"
        "def dead_too(): ...\n"
        "def helper(): Thing().through_another(); Tool().lively()\n"
        "def by_string(): ...\n"
    )
    (tests / "test_one.py").write_text(
        "from package import forgotten\n"
        "def test():\n    thing.used()\n    getattr(thing, 'by_string')()\n"
    )
    assert [where.rpartition(" ")[2] for where in untested(package, tests)] == [
        "Thing.through_another",  # exported: a test is to call it itself
        "Thing.forgotten",
        "Tool.dead",
        "dead_too",
    ]
    (tests / "test_two.py").write_text(
        "def test():\n    thing.forgotten()\n    thing.through_another()\n    tool.dead()\n"
    )
    assert list(untested(package, tests)) == []
