"""Help as a person meets it: the most used options in groups, all of them when asked for, examples that run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.daily import daily
from support.errands import Errands
from support.networks import HAS_MLX

from zimage_cli.app import main
from zimage_cli.commands import COMMANDS, root_parser
from zimage_cli.terminal.parser import CommandParser, shown_default

ROOT = root_parser()
EXAMPLES = [(name, command) for name, parser in ROOT.commands.items() for _, command in parser.examples]
LONG = ("--steps 2500", "--config", "--grid")  # what makes an example take seconds


@pytest.fixture
def helps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A function from the words of a command line to the help that it prints."""

    def helps(*argv: str, columns: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        return capsys.readouterr().out

    return helps


def flags(text: str) -> list[str]:
    """The options that a help text explains, in their order."""
    return re.findall(r"^  (?:-h, )?(--[\w-]+)", text.partition("\nExamples:")[0], re.MULTILINE)


def titles(text: str) -> list[str]:
    return [line.rstrip(":") for line in text.splitlines() if re.fullmatch(r"[A-Z].*:", line)]


@pytest.mark.parametrize("command", ["train", "generate"])
def test_short_help_shows_what_is_used_most_and_all_of_help_the_rest(command: str, helps) -> None:
    short, everything = helps(command, "--help"), helps(command, "--help-all")
    assert 12 <= len(flags(short)) <= 20 and "--help-all" in short.splitlines()[-1]
    assert set(flags(short)) < set(flags(everything))
    parser = ROOT.commands[command]
    assert len(flags(everything)) == len(set(flags(everything))) == len(parser.arguments) + 2  # two show help
    assert f"shows {len(flags(short)) - 2} of {len(parser.arguments)} options" in short


@pytest.mark.parametrize("command", ["train", "generate"])
def test_each_group_begins_with_the_options_of_short_help(command: str) -> None:
    parser = ROOT.commands[command]
    for title, actions in parser._sections(everything=True).items():
        essential = [parser.info(action).essential for action in actions if action in parser.infos]
        assert essential == sorted(essential, reverse=True), title


def test_groups_stand_in_their_order(helps) -> None:
    expected = [
        "Model", "Pictures and captions", "What is learned", "How far and how fast", "Noise levels",
        "The loss", "Held-out loss and previews", "Saving", "Memory", "The run", "Help", "Examples",
    ]  # fmt: skip
    assert titles(helps("train", "--help-all")) == expected
    assert titles(helps("train", "--help")) == [
        title for title in expected if title not in ("Noise levels", "The loss")
    ]


def test_short_help_of_every_command_fits_a_screen_and_a_half(helps) -> None:
    for command in COMMANDS:
        assert len(helps(command, "--help").splitlines()) <= 60, command


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_folded_to_the_width_of_the_terminal(command: str, columns: int, helps) -> None:
    words = ("--help-all",) if command in ("train", "generate") else ("--help",)
    _, _, options = helps(command, *words, columns=columns).partition("\n\n")  # the usage comes first
    for line in options.partition("\nExamples:")[0].splitlines():
        assert len(line) <= min(columns, 110), line


def test_choices_and_defaults_are_shown(helps) -> None:
    text = " ".join(helps("train", "--help-all").split())
    assert "Choices: constant, cosine, linear. Default: cosine" in text
    assert "--resume " in text and "They replace [trigger] in captions" in text
    assert [shown_default(value) for value in (None, False, "", (), [], 0, 0.5, (1, 2), "x")] == [
        "", "", "", "", "", "0", "0.5", "1,2", "x"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "known"),
    [
        (["train", "--optimizer=adamw4bit"], "adamw"),
        (["train", "--base-precision=2"], "bf16"),
        (["generate", "--sampler=ddim"], "heun"),
        (["convert", "--model-type=unet"], "transformer"),
    ],
)
def test_a_wrong_choice_is_refused_with_the_known_ones(
    argv: list[str], known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and known in error and argv[1].split("=")[1] in error
    assert len(error.splitlines()) <= 3  # the usage is one line


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ("--seed=rnd", "'rnd' is not a whole number, and not random"),
        ("--preview-steps=x", "'x' is not a whole number"),
        ("--steps=1.5", "'1.5' is not a whole number"),
        ("--guidance=much", "'much' is not a number"),
    ],
)
def test_a_wrong_number_is_named_in_words(option: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", option])
    assert stop.value.code == 2
    assert f"argument {option.split('=')[0]}: {fault}" in " ".join(capsys.readouterr().err.split())


def test_a_wrong_target_is_refused_with_the_known_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model-dir=m", "--dataset=d", "--targets=atention"]) == 1
    assert "--targets 'atention' is unknown: known are attention, feed_forward" in " ".join(
        capfd.readouterr().err.split()
    )


def test_help_is_plain_where_there_is_no_terminal_and_coloured_on_request(
    helps, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b[" not in helps("train", "--help")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = helps("train", "--help")
    assert "\x1b[" in coloured
    monkeypatch.delenv("FORCE_COLOR")
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == helps("train", "--help")


@pytest.mark.parametrize(
    ("command", "example"), daily(EXAMPLES, *(e for e in EXAMPLES if not any(word in e[1] for word in LONG)))
)
def test_examples_run(command: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if command in ("demo", "doctor", "completions", "serve") or (command == "train" and not HAS_MLX):
        assert root_parser([command]).parse_args(shlex.split(example.partition(" >")[0].split("&& ")[-1])[1:])
        return
    errands = Errands(tmp_path)
    if "fox.png" in example and command == "inspect":
        assert errands.run("zimage generate --model-dir ~/Z-Image-Turbo --prompt fox --output fox.png") == 0
    assert errands.run(example) == 0


def test_every_command_has_examples_and_its_usage_names_what_is_required() -> None:
    for name, parser in ROOT.commands.items():
        assert parser.examples, name
        required = {parser.info(a).flag for a in parser.arguments if parser.info(a).default == "required"}
        assert {flag for flag in required if flag.startswith("--")} <= set((parser.usage or "").split()), name


def test_an_example_is_folded_so_that_it_can_be_copied(helps) -> None:
    text = helps("train", "--help", columns=60).partition("\nExamples:")[2]
    folded = re.findall(r"^ +(zimage train (?:.*\\\n)*.*)$", text, re.MULTILINE)
    commands = [shlex.split(command.replace("\\\n", " ")) for command in folded[: len(ROOT.commands["train"].examples)]]
    assert commands == [shlex.split(command) for _, command in ROOT.commands["train"].examples]


def test_a_plain_argument_is_shown_too() -> None:
    parser = CommandParser("x", "A command.")
    parser.add_argument("--plain", type=int, default=3, help="A number.")
    assert "--plain" in parser.format_help() and parser.info(parser.arguments[0]).default == "3"
