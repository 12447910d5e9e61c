"""What the library says to its user: fields by name, so that a script or a server understands it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.sources import nodes

from zimage_ref import ConfigError, DatasetError, FormatError, GenerateConfig, TrainConfig, ZImageError
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.training.dataset import list_dataset

ROOT = Path(__file__).parents[1]
COMMANDS = {"zimage_mlx/tiny/__main__.py"}  # a command line of its own
FILES = [
    path for package in ("zimage_ref", "zimage_mlx", "zimage_serve") for path in sorted((ROOT / package).rglob("*.py"))
    if path.relative_to(ROOT).as_posix() not in COMMANDS
]  # fmt: skip
FLAG = re.compile(r"(^|[ =]|[^r]\()--[a-z]")
EXAMPLE = re.compile(r"`python -m [^`]*`")  # a command to run, as a whole


def texts(source: str) -> list[str]:
    """Every text in `source`; of an f-string the parts between its fields."""
    return [n.value for n in nodes(source) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def test_the_library_knows_no_flags_of_the_command_line() -> None:
    found = [
        f"{path.relative_to(ROOT).as_posix()}: {text}"
        for path in FILES
        for text in texts(path.read_text(encoding="utf-8"))
        if FLAG.search(EXAMPLE.sub("", text))
    ]
    assert found == []


def test_the_walk_finds_flags() -> None:
    assert [text for text in texts("def f(x):\n    raise E(f'{x}: give --force')\n") if FLAG.search(text)]
    assert not FLAG.search("fill:var(--muted);--line:#ccc")
    assert not FLAG.search(EXAMPLE.sub("", "make them with `python -m zimage_mlx.tiny --output DIR`"))


def test_a_message_names_fields_as_a_script_knows_them() -> None:
    with pytest.raises(ConfigError, match="^`strength` needs `init_image`$"):
        GenerateConfig("a fox", strength=0.5)
    with pytest.raises(ConfigError, match="^`lora_plus` 0.0 must be above 0$"):
        TrainConfig(Path("m"), Path("d"), lora_plus=0.0)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff", ""], ids=["cut off", "a list", "no text", "empty"])
def test_a_damaged_json_file_raises_what_its_reader_promises(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.png").write_bytes(b"")
    for name, error, read in (
        ("captions.json", DatasetError, lambda: list_dataset(tmp_path, "")),
        (
            "model.safetensors.index.json",
            FormatError,
            lambda: Checkpoint.open(tmp_path / "model.safetensors.index.json"),
        ),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ZImageError, match=re.escape(str(tmp_path / name))) as caught:
            read()
        assert type(caught.value) is error
