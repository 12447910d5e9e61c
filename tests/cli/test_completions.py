"""Completion scripts: one for each shell, which the shell loads and which completes as it should."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from zimage_cli.app import main
from zimage_cli.commands import COMMANDS
from zimage_cli.commands.completions import SHELLS

# Lines that a shell needs to complete "zimage WORDS" and to print the candidates
COMPLETE = """
source {script}
COMP_WORDS=({words}) COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_zimage zimage "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def script(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A function from a shell to a file with its script."""

    def script(shell: str) -> Path:
        assert main(["completions", shell]) == 0
        path = tmp_path / f"zimage.{shell}"
        path.write_text(capfd.readouterr().out, encoding="utf-8")
        return path

    return script


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_and_its_options(shell: str, script) -> None:
    text = script(shell).read_text(encoding="utf-8")
    assert all(command in text for command in COMMANDS)
    for word in ("training-adapter", "merge-lora", "dpm++2m", "adafactor", "comfy"):
        assert word in text or word.replace("+", "\\+") in text, word
    assert "\x1b" not in text


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_loads_its_script(shell: str, script) -> None:
    path = script(shell)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", path], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("zimage tr", ["train"]),
        ("zimage train --training-a", ["--training-adapter"]),
        ("zimage train --schedule c", ["constant", "cosine"]),
        ("zimage generate --sampler e", ["euler"]),
        ("zimage completions f", ["fish"]),
        ("zimage inspect --input note", ["notes.txt"]),
    ],
)
def test_bash_completes(words: str, expected: list[str], script, tmp_path: Path) -> None:
    path = script("bash")
    (tmp_path / "notes.txt").touch()
    program = COMPLETE.format(script=path.name, words=words)
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected, done.stderr


def test_an_unknown_shell_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completions", "ksh"])
    assert stop.value.code == 2 and all(shell in capsys.readouterr().err for shell in SHELLS[:1])
