"""What is installed: the packages listed are the ones in the tree, and what they export exists."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from support.networks import mlx_only

import zimage_mlx
import zimage_ref
from zimage_ref import errors

ROOT = Path(__file__).parents[1]
PUBLIC = ["zimage_ref", pytest.param("zimage_mlx", marks=mlx_only)]


def listed() -> dict[str, str]:
    """{package: folder} of pyproject.toml; read by pattern, as Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1])
    renamed = dict(re.findall(r'(\w+) = "(\w+)"', re.search(r"^package-dir = \{(.*?)\}", text, re.MULTILINE)[1]))
    tops = {package: package.split(".")[0] for package in packages}
    return {p: p.replace(top, renamed.get(top, top), 1).replace(".", "/") for p, top in tops.items()}


def test_every_folder_with_modules_is_a_listed_package() -> None:
    tops = [init.parent for init in ROOT.glob("*/__init__.py")]
    folders = {path.parent.relative_to(ROOT).as_posix() for top in tops for path in top.rglob("*.py")}
    assert folders == set(listed().values()) >= {"cli", "zimage_mlx", "zimage_ref"}


def test_macs_get_an_mlx_that_reports_errors_of_the_gpu() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "\"mlx>=0.32.1; sys_platform == 'darwin' and platform_machine == 'arm64'\"" in text  # 0.31 aborts on them


def test_nothing_asks_for_wired_memory() -> None:
    """Wired pages cannot be compressed or swapped: a Mac of 8 or 16 GB freezes without them."""
    sources = [
        path for folder in ("cli", "zimage_mlx", "zimage_ref", "zimage_serve") for path in (ROOT / folder).rglob("*.py")
    ]
    assert not [path for path in sources if "set_wired_limit" in path.read_text(encoding="utf-8")]


def test_every_package_says_that_it_is_typed() -> None:
    assert all((ROOT / folder / "py.typed").is_file() for folder in listed().values() if "/" not in folder)


def declared(package: str) -> dict[str, str]:
    """{public name: the module that type checkers take it from} of a package whose names are imported lazily."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {
        alias.name: importlib.util.resolve_name("." * statement.level + statement.module, package)
        for statement in block.body
        for alias in statement.names
    }


@pytest.mark.parametrize("package", PUBLIC)
def test_type_checkers_see_what_programs_get(package: str) -> None:
    module, homes = importlib.import_module(package), declared(package)
    assert module.__all__ == sorted({*homes, "__version__"})
    for name, home in homes.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_listed_and_others_are_unknown(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    names: dict[str, object] = {}
    exec(f"from {package} import *", names)
    assert names.keys() - {"__builtins__"} == set(module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec(f"from {package} import nothing")


@mlx_only
def test_everything_public_is_in_zimage_mlx() -> None:
    assert set(zimage_ref.__all__) <= set(zimage_mlx.__all__)
    different = {name for name in zimage_ref.__all__ if getattr(zimage_ref, name) is not getattr(zimage_mlx, name)}
    assert different == {"ZImagePipeline"}
    assert {"train", "make_plan", "Event", "Step", "Saved", "Done"} <= set(zimage_mlx.__all__)


def test_every_error_is_public_and_a_zimage_error() -> None:
    raised = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert raised <= set(zimage_ref.__all__)
    assert all(issubclass(getattr(zimage_ref, name), zimage_ref.ZImageError) for name in raised)


def test_importing_a_package_loads_no_library() -> None:
    program = (
        "import sys, zimage_mlx, zimage_ref, zimage_serve;"
        "print(*{'mlx.core', 'numpy', 'PIL', 'fastapi'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_version_is_the_distributions() -> None:
    assert zimage_ref.__version__ == version("zimage-mlx")


def test_the_command_is_zimage() -> None:
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["zimage"] == "zimage_cli.app:main"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, installed in an environment of its own that borrows this one's other packages."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"  # a copy: building leaves files behind, and old ones would get into the wheel
    for folder in ("cli", "zimage_mlx", "zimage_ref", "zimage_serve"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    environment = home / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", home, source], check=True)
    (wheel,) = home.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = environment.rglob("site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return python


def kept(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_built_in_model(installed: Path) -> None:
    (packages,) = installed.parents[1].rglob("site-packages")
    for package, folder in listed().items():
        if "." not in package:
            here = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if kept(p)}
            there = {p.relative_to(packages / package) for p in (packages / package).rglob("*") if kept(p)}
            assert here == there


@pytest.mark.slow
@mlx_only
def test_the_wheel_runs_the_demo_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    program = "import zimage_cli as a, zimage_mlx as b, zimage_ref as c; print(*(p.__file__ for p in (a, b, c)))"
    found = subprocess.run([installed, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(Path(file).is_relative_to(installed.parents[1]) for file in found.split())
    done = subprocess.run(
        [installed.with_name("zimage"), "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "zimage-demo").iterdir()}
    assert made >= {"dataset", "before-after.png", "zorp.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zimage-demo"]
