"""The rules of the house that no linter knows."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("client", "protocol", "server", "storage")
# Packages that ZConfig's %import wants for a component.xml; no module of code in them.
COMPONENTS = ("client.upstream",)
# Who may import whom; protocol and storage know nobody.
ALLOWED = {
    "protocol": set[str](),
    "storage": set[str](),
    "client": {"protocol"},
    "server": {"protocol", "storage"},
}
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 600
# A name that says nothing about what is inside.
EMPTY_NAMES = {"base", "common", "helper", "helpers", "manager", "util", "utils"}
# Modules whose tests are in no mirror: "package/module" -> the file that tests it.
COVERED_ELSEWHERE: dict[str, str] = {}
# Each is a pattern that does not match the line it stands in.
STRANGE_WORDS = {
    "a path of somebody's machine": r"(?<![\w.])/(home|root|work)/\w",
    "the host of a registry": r"py[p]i\.org|python[h]osted\.org",
    "work left for later": r"\b(TO[D]O|FIX[M]E|X[X]X)\b",
}


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path, ast.parse(path.read_text())


def project_files() -> list[Path]:
    """All files of the project, those included that are not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def imported_packages(tree: ast.Module) -> set[str]:
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "zeolith":
            names.update(f"zeolith.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("zeolith.")}


def test_dependencies_point_one_way():
    for package, path, tree in modules():
        strangers = imported_packages(tree) - ALLOWED[package] - {package}
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_functions_fit_a_screen():
    for _package, path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                assert lines <= FUNCTION_LINES_MAX, f"{path}:{node.lineno} {lines}"


def test_modules_fit_a_head():
    for _package, path, _tree in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= MODULE_LINES_MAX, f"{path.relative_to(ROOT)} {lines}"


def test_modules_say_what_they_own():
    for _package, path, tree in modules():
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"


def test_modules_are_named_after_a_thing():
    for _package, path, _tree in modules():
        empty = EMPTY_NAMES.intersection(path.stem.split("_"))
        assert not empty, f"{path.relative_to(ROOT)}"


def test_every_module_has_its_test_file():
    for package, path, _tree in modules():
        if path.stem in ("__init__", "__main__"):
            continue
        mirror = f"tests/{package}/test_{path.stem}.py"
        tested_by = COVERED_ELSEWHERE.get(f"{package}/{path.stem}", mirror)
        assert (ROOT / tested_by).is_file(), f"{path.relative_to(ROOT)}: {tested_by}"


def test_the_list_of_modules_tested_elsewhere_holds_no_others():
    for name, tested_by in COVERED_ELSEWHERE.items():
        package, module = name.split("/")
        assert (ROOT / package / f"{module}.py").is_file(), name
        mirror = ROOT / "tests" / package / f"test_{module}.py"
        assert not mirror.exists(), f"{name} has a mirror and needs no {tested_by}"


def test_every_folder_of_tests_is_a_package():
    """Relative imports and unique module names need it."""
    for path in (ROOT / "tests").rglob("*.py"):
        init = path.with_name("__init__.py")
        assert init.is_file(), f"{init.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("what", STRANGE_WORDS)
def test_the_project_speaks_of_itself_alone(what):
    pattern = re.compile(STRANGE_WORDS[what])
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found = pattern.search(line)
            assert not found, f"{path.relative_to(ROOT)}:{number} {what}: {found}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_declared_everywhere(package):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert f"zeolith.{package}" in settings["setuptools"]["packages"]
    assert f"zeolith.{package}" in settings["coverage"]["run"]["source_pkgs"]
    assert (ROOT / ".src/zeolith" / package).resolve() == ROOT / package
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", COMPONENTS)
def test_a_component_has_no_code(package):
    folder = ROOT.joinpath(*package.split("."))
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "__init__.py",
        "component.xml",
    }
    (docstring,) = ast.parse((folder / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


def test_no_undeclared_package():
    declared = {f"zeolith.{package}" for package in (*PACKAGES, *COMPONENTS)}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(settings["setuptools"]["packages"]) == declared
    found = {
        ".".join(("zeolith", *init.parent.relative_to(ROOT).parts))
        for package in PACKAGES
        for init in (ROOT / package).rglob("__init__.py")
    }
    assert found == declared
