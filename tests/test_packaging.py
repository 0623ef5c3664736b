from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT
from tests.floors import pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = {
    "default": PROJECT["project"]["dependencies"],
    **PROJECT["project"]["optional-dependencies"],
}
FLAT = [pytest.param(text, id=f"{extra}-{text}") for extra, texts in REQUIREMENTS.items() for text in texts]
HEAVY = ("diffusers", "torch_fidelity", "torchvision", "torchmetrics", "open_clip", "wandb", "matplotlib", "pandas")
IMPORT_EVERYTHING = f"""
import importlib, pkgutil, sys

sys.modules.update(dict.fromkeys({HEAVY!r}))  # an import of any of these raises ImportError from here on
for package in ("edadm", "baselines"):
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(module.name, "imports", error)
        else:
            print("fine", module.name, file=sys.stderr)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def floor(requirement: Requirement) -> str:
    return next(part.version for part in requirement.specifier if part.operator == ">=")


def test_import_edadm_is_light() -> None:
    result = python("import sys, edadm; print(sorted({name.partition('.')[0] for name in sys.modules}))")
    assert result.returncode == 0, result.stderr
    assert "edadm" in result.stdout
    for name in ("torch", "numpy", "hydra", "omegaconf", *HEAVY):
        assert f"'{name}'" not in result.stdout


def test_every_module_imports_without_heavy_libraries() -> None:
    result = python(IMPORT_EVERYTHING)
    assert result.returncode == 0, result.stderr
    assert not result.stdout, result.stdout
    imported = {line.removeprefix("fine ") for line in result.stderr.splitlines() if line.startswith("fine ")}
    assert {"edadm.experiment", "edadm.quant.families.unet2d", "baselines.ptq4dm"} <= imported


def test_the_wheel_holds_every_module_and_every_asset(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("edadm", "baselines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    wanted = {name for name in files if name.startswith(("edadm/", "baselines/"))}
    assert any(name.startswith("edadm/assets/") for name in wanted)
    assert wanted <= inside, sorted(wanted - inside)
    assert not [name for name in inside if name.startswith(("tests/", "conf/", "experiments/"))]


@pytest.mark.parametrize("text", FLAT)
def test_every_dependency_has_a_floor(text: str) -> None:
    assert floor(Requirement(text))


def test_floors_are_pinned_as_make_installs_them() -> None:
    for extras in ((), ("test",), ("test", "text")):
        texts = [text for name in ("default", *extras) for text in REQUIREMENTS[name]]
        expected = {f"{requirement.name}=={floor(requirement)}" for requirement in map(Requirement, texts)}
        assert len(found := pins(*extras)) == len(set(found)) and set(found) == expected


def test_the_network_is_left_alone_unless_asked_for() -> None:
    assert "not network" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]


@pytest.mark.network
def test_all_floors_install_together(tmp_path: Path) -> None:
    venv.create(
        tmp_path / "env", with_pip=True, upgrade_deps=True
    )  # the newest pip resolves without downloading wheels
    pip = [str(tmp_path / "env" / "bin" / "python"), "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    result = subprocess.run([*pip, *pins("test")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    planned = re.sub(r"[-_.]+", "-", result.stdout.splitlines()[-1]).lower()
    for requirement in map(Requirement, REQUIREMENTS["default"]):
        assert re.sub(r"[-_.]+", "-", f"{requirement.name}-{floor(requirement)}").lower() in planned


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("results/local/cifar10_tiny/0123456789abcdef.json", True),
        ("results/local/2026-11-21_12-00-00.png", True),
        ("results/reference/cifar10_tiny/0123456789abcdef.json", False),
        (".venv/bin/python", True),
        ("edadm/__pycache__/store.pyc", True),
        ("edadm/assets/cifar10_tiny/config.json", False),
    ],
)
def test_git_ignores_what_runs_leave_behind_and_nothing_else(path: str, ignored: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    result = subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT, env=environment)
    assert result.returncode == (0 if ignored else 1)
