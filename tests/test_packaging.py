"""What the tree becomes when somebody installs it, and what make makes of it."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("client", "protocol", "server", "storage")
MAKE = shutil.which("make")
# Whether setuptools can compile here.
COMPILES = bool(
    shutil.which(str(sysconfig.get_config_var("CC") or "cc").split()[0])
    and Path(sysconfig.get_path("include"), "Python.h").is_file()
)


def packaged_files() -> set[str]:
    """What an installation needs of the four folders, relative to the root."""
    return {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }


def built_from(tree: Path, *options: str, **environment: str) -> Path:
    """The folder with what is built of a copy of the project in ``tree``."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "build", "--no-isolation", *options]
    build += ["--outdir", "dist", "."]
    done = subprocess.run(
        build,
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


def compiled_in(wheel: zipfile.ZipFile) -> list[str]:
    """The compiled modules of a wheel, without the name of their platform."""
    return [n.partition(".")[0] for n in wheel.namelist() if n.endswith(".so")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    return built_from(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def wheel(built) -> Iterator[zipfile.ZipFile]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def in_the_metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (found,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(found).decode()


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel):
    held = {n for n in wheel.namelist() if ".dist-info/" not in n}
    held -= {n for n in held if n.endswith(".so")}
    sources = {name for name in packaged_files() if name.endswith(".c")}
    assert held == {f"zeolith/{name}" for name in packaged_files() - sources}


@pytest.mark.skipif(not COMPILES, reason="there is no C compiler, or no Python.h")
def test_the_wheel_holds_what_was_compiled(wheel):
    assert sorted(compiled_in(wheel)) == [
        "zeolith/client/_round_trip",
        "zeolith/server/_answering",
    ]


def test_a_wheel_is_built_without_a_compiler(tmp_path):
    (path,) = built_from(tmp_path, "--wheel", CC="false").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        assert compiled_in(wheel) == []
        assert "zeolith/client/round_trip.py" in wheel.namelist()


def test_the_wheel_holds_the_licence(wheel):
    licence = in_the_metadata(wheel, "licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_text()
    assert Parser().parsestr(in_the_metadata(wheel, "METADATA"))[
        "License-Expression"
    ] == ("MIT")


def test_the_wheel_names_the_program_and_the_resolver(wheel):
    declared = in_the_metadata(wheel, "entry_points.txt").splitlines()
    assert "zeolith = zeolith.server.cli:main" in declared
    assert "zeolith = zeolith.client.uri:resolver" in declared


def test_the_sdist_holds_what_the_wheel_is_made_of(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        held = {"/".join(Path(name).parts[1:]) for name in sdist.getnames()}
    assert packaged_files() <= held
    assert {"pyproject.toml", "README.md", "LICENSE"} <= held


def test_what_is_installed_here_is_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("zeolith") == project["version"]


def test_zodburi_finds_the_resolver():
    (found,) = entry_points(group="zodburi.resolvers", name="zeolith")
    assert callable(found.load())


@pytest.mark.parametrize(
    "name",
    sorted(
        name for name in packaged_files() if name.endswith(".py") and "__" not in name
    ),
)
def test_every_module_is_imported_by_one_name(name):
    module = importlib.import_module(f"zeolith.{name[:-3].replace('/', '.')}")
    path = str(ROOT / name)
    assert module.__file__ == path
    names = [n for n, m in sys.modules.items() if getattr(m, "__file__", None) == path]
    assert names == [module.__name__]


@pytest.fixture
def bare_machine(tmp_path) -> Path:
    """A folder with the Makefile and a bin/ that is all of the PATH."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "bin").mkdir()
    for tool in ("rm", "mkdir", "touch"):
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin" / tool).symlink_to(found)
    return tmp_path


def make(
    folder: Path, target: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What make does that was not started by the make that runs the tests."""
    assert MAKE
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    environment["PATH"] = path or environment["PATH"]
    return subprocess.run(
        [MAKE, target], cwd=folder, env=environment, capture_output=True, text=True
    )


def make_on(machine: Path, target: str) -> subprocess.CompletedProcess[str]:
    return make(machine, target, path=str(machine / "bin"))


def pretend_python(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_make_says_so_when_every_python_is_too_old(bare_machine):
    pretend_python(bare_machine, "python3", "exit 1")
    done = make_on(bare_machine, ".venv")
    assert done.returncode != 0
    assert "zeolith needs Python 3.11 or newer" in done.stderr
    assert not (bare_machine / ".venv").exists()


def test_make_passes_over_an_old_python_for_a_newer_one(bare_machine):
    pretend_python(bare_machine, "python3", "exit 1")
    log = bare_machine / "log"
    pretend_python(bare_machine, "python3.12", f'echo "$*" >>{log}; exit 0')
    make_on(bare_machine, ".venv/bin/python")
    assert "-m venv .venv" in log.read_text()


def test_make_leaves_no_half_an_environment(bare_machine):
    script = 'test "$2" != venv || { mkdir -p .venv/bin; exit 1; }'
    pretend_python(bare_machine, "python3", script)
    assert make_on(bare_machine, ".venv").returncode != 0
    assert not (bare_machine / ".venv").exists()


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:"))
    targets = set(phony.split()[1:]) - {"$(VENV)"}
    shown = make(ROOT, "help")
    assert {line.split()[1] for line in shown.stdout.splitlines()} == targets


def test_ci_runs_what_make_makes():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert {"make lint", "make test"} <= {line.strip() for line in text.splitlines()}
