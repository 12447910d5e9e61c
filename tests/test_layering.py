"""Who may import whom: cli -> zimage_mlx -> the nouns of zimage_ref. Read from the source, nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"cli": "zimage_cli", "zimage_mlx": "zimage_mlx", "zimage_ref": "zimage_ref"}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

MATHEMATICS = {
    f"zimage_ref.{m}" for m in ("ops", "weights", "transformer", "text_encoder", "vae", "pipeline", "lora_merge")
}
MATHEMATICS.add("zimage_ref.ZImagePipeline")  # the same, by its public name
FORBIDDEN = {  # package -> what its files may not import
    "zimage_ref": {"mlx", "zimage_mlx", "zimage_cli", "cli"},
    "zimage_mlx": {"zimage_cli", "cli", *MATHEMATICS},
    "cli": {"cli", "mlx", "numpy"},
}
HOMES = {  # a library -> the only files that may import it; a folder stands for all of its files
    "PIL": ("zimage_ref/images.py", "zimage_ref/picture_metadata.py", "zimage_ref/drawings.py", "zimage_ref/judge.py"),
    "rich": ("cli",),
    "argparse": ("cli", "zimage_mlx/tiny.py"),
    "tokenizers": ("zimage_ref/tokenizer.py", "zimage_ref/tiny_files.py"),
    "safetensors": ("zimage_ref/safetensors_io.py",),
    "torch": (), "diffusers": (), "transformers": (), "peft": (),
}  # fmt: skip


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, tree: ast.AST) -> set[str]:
    """Every module and every name that `path` imports, absolute: {"zimage_ref.ops", "zimage_ref.ops.silu", ...}."""
    package, found = PACKAGES[path.relative_to(ROOT).parts[0]], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, parents: set[str] | tuple[str, ...], separator: str) -> bool:
    return any(name == parent or name.startswith(parent + separator) for parent in parents)


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_imports_point_downwards(path: Path) -> None:
    forbidden = FORBIDDEN[path.relative_to(ROOT).parts[0]]
    found = imports(path, ast.parse(path.read_text(encoding="utf-8")))
    assert not sorted(name for name in found if within(name, forbidden, "."))


def test_definitions_never_need_the_mathematics() -> None:
    """What zimage_mlx shares with zimage_ref stands on its own."""
    above = {*MATHEMATICS, "zimage_ref.__init__"}
    for path in (ROOT / "zimage_ref").glob("*.py"):
        if f"zimage_ref.{path.stem}" not in above:
            found = imports(path, ast.parse(path.read_text(encoding="utf-8")))
            assert not sorted(name for name in found if within(name, MATHEMATICS, ".")), path.name


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_each_library_is_imported_where_it_is_at_home(path: Path) -> None:
    found = imports(path, ast.parse(path.read_text(encoding="utf-8")))
    strangers = [lib for lib, homes in HOMES.items() if not within(identify(path), homes, "/")]
    assert not sorted(name for name in found if within(name, set(strangers), "."))


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_imports_stand_at_the_top_and_only_cli_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        hidden = [n.lineno for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not hidden, f"{function.name} imports on line {hidden[0]}"
    prints = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"]
    assert path.is_relative_to(ROOT / "cli") or not prints, f"print on line {prints[0]}"


def test_the_rules_catch_what_they_are_for(tmp_path: Path) -> None:
    """The same functions on source that breaks every rule."""
    source = ast.parse("def f():\n    from zimage_ref.ops import silu\nfrom zimage_ref import vae\nimport PIL.Image")
    found = imports(ROOT / "zimage_mlx" / "x.py", source)
    assert {n for n in found if within(n, FORBIDDEN["zimage_mlx"], ".")} == {
        "zimage_ref.ops", "zimage_ref.ops.silu", "zimage_ref.vae",
    }  # fmt: skip
    assert within("PIL.Image", {"PIL"}, ".") and not within("PILOT", {"PIL"}, ".")


def test_both_packages_have_the_same_networks_under_the_same_names() -> None:
    """A class of zimage_mlx's networks that exists in zimage_ref stands in the file of the same name, in that order."""
    for module in ("transformer", "text_encoder", "vae"):
        ref, mlx = (
            [n.name for n in ast.parse((ROOT / package / f"{module}.py").read_text(encoding="utf-8")).body
             if isinstance(n, ast.ClassDef)]
            for package in ("zimage_ref", "zimage_mlx")
        )  # fmt: skip
        assert [name for name in mlx if name in ref] == ref
