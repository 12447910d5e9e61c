"""What is installed: the packages listed are the ones in the tree, and what they export exists."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from support.networks import mlx_only

ROOT = Path(__file__).parents[1]


def listed() -> dict[str, str]:
    """{package: folder} of pyproject.toml; read by pattern, as Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)[1])
    renamed = dict(re.findall(r'(\w+) = "(\w+)"', re.search(r"^package-dir = \{(.*?)\}", text, re.M)[1]))
    tops = {package: package.split(".")[0] for package in packages}
    return {p: p.replace(top, renamed.get(top, top), 1).replace(".", "/") for p, top in tops.items()}


def test_every_folder_with_modules_is_a_listed_package() -> None:
    tops = [init.parent for init in ROOT.glob("*/__init__.py")]
    folders = {path.parent.relative_to(ROOT).as_posix() for top in tops for path in top.rglob("*.py")}
    assert folders == set(listed().values()) >= {"cli", "zimage_mlx", "zimage_ref"}


def test_every_package_says_that_it_is_typed() -> None:
    assert all((ROOT / folder / "py.typed").is_file() for folder in listed().values() if "/" not in folder)


@pytest.mark.parametrize("package", ["zimage_ref", pytest.param("zimage_mlx", marks=mlx_only)])
def test_all_is_sorted_complete_and_exists(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    public = {
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("zimage_")
    }  # fmt: skip
    assert public - set(module.__all__) == set()


def test_the_version_is_the_distributions() -> None:
    assert importlib.import_module("zimage_ref").__version__ == version("zimage-mlx")


def test_the_command_is_zimage() -> None:
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["zimage"] == "zimage_cli.app:main"
