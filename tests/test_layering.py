"""Who may import whom, as a table of folders. Read from the source; nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path

from support.pages import read
from support.sources import nodes, parsed

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "cli": "zimage_cli", "zimage_mlx": "zimage_mlx", "zimage_ref": "zimage_ref", "zimage_serve": "zimage_serve",
}  # fmt: skip
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# A room is a folder, or a module at the top of a package. Each may import the rooms named beside it, all of them
# further up in this table: so there is no circle, and nothing below imports what is above it.
_BASE = "errors formats model"
ROOMS = {
    "zimage_ref.lazy": "",
    "zimage_ref.errors": "",
    "zimage_ref.bounds": "errors",
    "zimage_ref.options": "errors",
    "zimage_ref.extras": "errors",
    "zimage_ref.version": "",
    "zimage_ref.formats": "errors extras",
    "zimage_ref.options_file": "errors formats",
    "zimage_ref.model": "errors bounds formats",
    "zimage_ref.pictures": "errors extras formats",
    "zimage_ref.lora": f"{_BASE} bounds",
    "zimage_ref.networks": "formats model lora",
    "zimage_ref.checkpoints": f"{_BASE} extras lora",
    "zimage_ref.memory": f"{_BASE} checkpoints",
    "zimage_ref.streaming": f"{_BASE} checkpoints memory",
    "zimage_ref.generation":
        f"{_BASE} bounds version options options_file pictures lora checkpoints memory streaming",
    "zimage_ref.pipeline": "formats model checkpoints lora networks memory generation",
    "zimage_ref.training":
        f"{_BASE} bounds extras options options_file pictures lora checkpoints memory streaming generation",
    "zimage_ref.doctor": "errors formats model version checkpoints memory",
    "zimage_ref.inspection": "errors formats checkpoints",
    "zimage_ref.requirements": "formats model checkpoints memory streaming training",
    "zimage_ref.tiny": "formats model pictures checkpoints",
    "zimage_ref": f"lazy version {_BASE} lora checkpoints generation pipeline training",
    "zimage_mlx.blas": "",
    "zimage_mlx.device": "errors memory",
    "zimage_mlx.networks": "zimage_mlx.device errors formats model",
    "zimage_mlx.lora": "zimage_mlx.networks formats model lora",
    "zimage_mlx.pipeline":
        "zimage_mlx.device zimage_mlx.networks zimage_mlx.lora formats model lora checkpoints memory streaming "
        "generation doctor",
    "zimage_mlx.training":
        "zimage_mlx.device zimage_mlx.networks zimage_mlx.lora zimage_mlx.pipeline zimage_ref errors formats model "
        "pictures lora memory training",
    "zimage_mlx.doctor":
        "zimage_mlx.device zimage_mlx.networks zimage_mlx.lora zimage_mlx.pipeline zimage_mlx.training formats model "
        "pictures networks checkpoints memory doctor",
    "zimage_mlx.tiny":
        "zimage_mlx.device zimage_mlx.networks zimage_mlx.pipeline errors formats model options pictures tiny",
    "zimage_mlx": "zimage_mlx.blas zimage_mlx.pipeline zimage_mlx.training zimage_mlx.doctor zimage_ref lazy training",
    "zimage_serve.refusals": "errors",
    "zimage_serve.settings": "errors bounds options generation",
    "zimage_serve.engines": "formats memory generation training",
    "zimage_serve.store": "zimage_serve.refusals errors formats pictures",
    "zimage_serve.work":
        "zimage_serve.refusals zimage_serve.settings zimage_serve.engines zimage_serve.store errors bounds "
        "options options_file formats model pictures lora checkpoints memory generation training inspection doctor",
    "zimage_serve.web":
        "zimage_serve.refusals zimage_serve.settings zimage_serve.store zimage_serve.work version errors options "
        "formats pictures generation training",
    "zimage_serve.server":
        "zimage_serve.settings zimage_serve.engines zimage_serve.web zimage_serve.work errors",
    "zimage_serve": "",
    "zimage_cli.terminal": "zimage_ref zimage_mlx errors formats options options_file pictures generation",
    "zimage_cli.commands":
        "zimage_cli.terminal zimage_serve.settings zimage_serve.engines zimage_mlx.blas zimage_ref errors bounds "
        "extras formats options options_file pictures lora checkpoints memory generation training inspection "
        "requirements tiny doctor",
    "zimage_cli.app": "zimage_cli.terminal zimage_cli.commands errors formats",
    "zimage_cli.__main__": "zimage_cli.app",
    "zimage_cli": "",
}  # fmt: skip
FORBIDDEN = {  # package -> what its files may not import, besides
    "zimage_ref": {"mlx"},
    "zimage_mlx": {"rich"},
    "zimage_serve": {"mlx", "rich"},
    "zimage_cli": {"cli", "mlx", "numpy"},
}
HOMES = {  # a library -> the only files that may import it; a folder stands for all of its files
    "PIL": ("zimage_ref/pictures", "zimage_ref/tiny/drawings.py", "zimage_ref/tiny/judge.py"),
    "rich": ("cli",),
    "rich_argparse": ("cli/terminal/parser.py",),
    "shtab": ("cli/commands/completions.py",),
    "argparse": ("cli", "zimage_mlx/tiny/__main__.py"),
    "tokenizers": ("zimage_ref/model/tokenizer.py", "zimage_ref/tiny/files.py"),
    "safetensors": ("zimage_ref/formats/safetensors.py",),
    "fastapi": ("zimage_serve/web",), "starlette": ("zimage_serve/web",), "uvicorn": ("zimage_serve/server.py",),
    "mcp": ("zimage_serve/web/agent.py",), "sqlite3": ("zimage_serve/store/database.py",),
    "torch": (), "diffusers": (), "transformers": (), "peft": (),
}  # fmt: skip

LATE = {  # the only files that import when they run, not when they are read -> what, and why then
    "zimage_ref/lazy.py": "public names: most programs use few of them",
    "zimage_ref/extras.py": "packages of an extra: they may be absent",
    "cli/commands/__init__.py": "the command that was asked for",
    "cli/commands/inspect.py": "what shows folders, LoRAs and pictures: a checkpoint needs none of it",
    "cli/commands/serve.py": "the server: its packages belong to an extra",
    "zimage_serve/server.py": "the interface of agents: it needs an extra",
    "cli/terminal/backends.py": "MLX: may be absent",
}


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> str:
    """The package that the file `path` is in: "zimage_cli.commands" for cli/commands/train.py."""
    first, *folders, _ = path.relative_to(ROOT).parts
    return ".".join([PACKAGES[first], *folders])


def imports(path: Path, source: str) -> set[str]:
    """Every module and every name that `path` imports, absolute: {"zimage_ref.errors", "zimage_ref.errors.listing"}."""
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path).split(".")[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, parents: set[str] | tuple[str, ...], separator: str) -> bool:
    return any(name == parent or name.startswith(parent + separator) for parent in parents)


def room(name: str) -> str | None:
    """The room that a module, or a name in it, belongs to; None for one outside of this project."""
    top, *below = name.split(".")
    if top not in PACKAGES.values():
        return None
    return next((place for place in (f"{top}.{below[0]}" if below else top, top) if place in ROOMS), name)


def rooms_imported(path: Path, source: str) -> set[str]:
    """The rooms that the file `path` imports from, but its own."""
    own = room(package_of(path)) if path.name == "__init__.py" else room(f"{package_of(path)}.{path.stem}")
    deepest = imports(path, source)
    deepest = {name for name in deepest if not any(other.startswith(f"{name}.") for other in deepest)}
    return {place for name in deepest if (place := room(name)) is not None} - {own or ""}


def allowed(place: str) -> set[str]:
    """The rooms that `place` may import; a short name is a room of zimage_ref."""
    return {name if name.startswith("zimage_") else f"zimage_ref.{name}" for name in ROOMS[place].split()}


def test_every_folder_is_a_room_and_every_room_exists() -> None:
    found = {package_of(p) if p.name == "__init__.py" else f"{package_of(p)}.{p.stem}" for p in FILES}
    assert {room(name) for name in found} == set(ROOMS)
    assert not [name for name in found if name.count(".") == 1 and name not in ROOMS]


def test_the_table_has_no_circle() -> None:
    """Each room names only rooms above it, and nothing that it does not use."""
    for i, place in enumerate(ROOMS):
        assert allowed(place) <= set(list(ROOMS)[:i]), place


def test_imports_follow_the_table() -> None:
    for path in FILES:
        source = read(path)
        own = room(package_of(path) if path.name == "__init__.py" else f"{package_of(path)}.{path.stem}")
        assert own is not None, identify(path)
        assert rooms_imported(path, source) <= allowed(own), identify(path)
        forbidden = FORBIDDEN[PACKAGES[path.relative_to(ROOT).parts[0]]]
        assert not sorted(name for name in imports(path, source) if within(name, forbidden, ".")), identify(path)


def test_the_table_allows_no_more_than_is_used() -> None:
    used: dict[str, set[str]] = {place: set() for place in ROOMS}
    for path in FILES:
        own = room(package_of(path) if path.name == "__init__.py" else f"{package_of(path)}.{path.stem}")
        used[own or ""] |= rooms_imported(path, read(path))
    assert {place: sorted(allowed(place) - found) for place, found in used.items() if allowed(place) - found} == {}


def test_each_library_is_imported_where_it_is_at_home() -> None:
    for path in FILES:
        found = imports(path, read(path))
        strangers = [lib for lib, homes in HOMES.items() if not within(identify(path), homes, "/")]
        assert not sorted(name for name in found if within(name, set(strangers), ".")), identify(path)


def test_imports_stand_at_the_top_and_only_cli_prints() -> None:
    for path in FILES:
        found = nodes(read(path))
        for function in (n for n in found if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
            hidden = [n.lineno for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not hidden, f"{identify(path)}: {function.name} imports on line {hidden[0]}"
        prints = [n.lineno for n in found if isinstance(n, ast.Name) and n.id == "print"]
        assert path.is_relative_to(ROOT / "cli") or not prints, f"{identify(path)}: print on line {prints[0]}"


def test_few_files_import_late() -> None:
    """What `import_module` loads is in no list of imports, so each file that calls it is known by name."""
    late = {
        identify(path)
        for path in FILES
        for node in nodes(read(path))
        if isinstance(node, ast.Name | ast.Attribute)
        and (node.id if isinstance(node, ast.Name) else node.attr) in ("import_module", "__import__")
    }
    assert late == set(LATE)


def test_tests_are_skipped_for_libraries_only() -> None:
    """`importorskip` of a module of this project that has moved would skip its test for ever."""
    names = {
        str(ast.literal_eval(node.args[0]))
        for path in (ROOT / "tests").rglob("*.py")
        for node in (nodes(read(path)) if "importorskip" in read(path) else ())
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip"
        if isinstance(node.args[0], ast.Constant)
    }
    libraries = {
        "axe_playwright_python", "cv2", "diffusers", "fastapi", "gguf", "huggingface_hub", "lycoris", "mcp", "mlx",
        "openai", "peft", "playwright", "prodigyopt", "schedulefree", "scipy", "tensorboard", "torch", "transformers",
        "wandb",
    }  # fmt: skip
    folders = {name: folder for folder, name in PACKAGES.items()} | {"support": "tests/support"}
    for top, *below in (name.split(".") for name in names):
        file = ROOT.joinpath(folders.get(top, top), *below)
        assert top in libraries or file.with_suffix(".py").is_file() or (file / "__init__.py").is_file(), file


def test_each_folder_says_what_it_knows_may_import_and_must_never_know() -> None:
    folders = [p for p in FILES if p.name == "__init__.py" and p.parent.parent != ROOT]  # the packages say more
    for init in folders:
        text = ast.get_docstring(parsed(read(init))) or ""
        heads = [line.partition(":")[0] for line in text.split("\n")]
        assert heads == ["Knows", "May import", "Must never know"], identify(init)


def test_the_rules_catch_what_they_are_for() -> None:
    """The same functions on source that breaks every rule."""
    source = "from zimage_ref.networks.ops import silu\nfrom zimage_ref import networks\nimport PIL.Image"
    path = ROOT / "zimage_mlx" / "networks" / "x.py"
    assert rooms_imported(path, source) == {"zimage_ref.networks"} and "zimage_ref.networks" not in allowed(
        "zimage_mlx.networks"
    )
    assert rooms_imported(path, "from .ops import silu") == set()
    assert rooms_imported(path, "from zimage_ref import __version__") == {"zimage_ref"}
    assert within("PIL.Image", {"PIL"}, ".") and not within("PILOT", {"PIL"}, ".")


def test_both_packages_have_the_same_networks_under_the_same_names() -> None:
    """A class of zimage_mlx's networks that exists in zimage_ref stands in the file of the same name, in that order."""
    for module in ("transformer", "text_encoder", "vae", "controlnet", "hints"):
        files = (ROOT / package / "networks" / f"{module}.py" for package in ("zimage_ref", "zimage_mlx"))
        ref, mlx = ([n.name for n in parsed(read(file)).body if isinstance(n, ast.ClassDef)] for file in files)
        assert [name for name in mlx if name in ref] == ref
