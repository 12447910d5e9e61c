"""The parser of a command, and its help: options in groups, the most used ones first, then examples.

`--help` shows the essential options, `--help-all` shows all.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.style import StyleType
from rich.text import Text
from rich_argparse import RawDescriptionRichHelpFormatter

from zimage_ref.errors import ConfigError
from zimage_ref.options import Group
from zimage_ref.options_file import typed

_WIDEST = 110  # columns: longer lines are hard to read
_HELP_POSITION = 30  # help texts start at this column or before it
_PLAIN = "Options"  # the title over options without a group


class HelpFormatter(RawDescriptionRichHelpFormatter):
    """Prints help in colours on a terminal. It is plain text elsewhere, and if NO_COLOR is set."""

    group_name_formatter = str
    styles: ClassVar[dict[str, StyleType]] = {
        **RawDescriptionRichHelpFormatter.styles,
        "argparse.args": "cyan",
        "argparse.groups": "bold",
        "argparse.metavar": "green",
        "argparse.prog": "bold",
    }
    text_markup = False  # [trigger] is a word, not a style
    help_markup = False

    def __init__(self, prog: str) -> None:
        self.line_width = width = min(_WIDEST, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, max_help_position=min(_HELP_POSITION, width * 3 // 8), width=width)


@dataclass(frozen=True)
class OptionInfo:
    """The facts about an option that help and pages show."""

    flag: str  # such as --rank
    help: str  # sentences
    default: str = ""  # as a person types it, "required", or "" for an option that is off or empty
    choices: tuple[str, ...] = ()
    group: Group | None = None
    essential: bool = True  # short help shows it
    is_path: bool = False  # shells complete it with files

    @property
    def meaning(self) -> str:
        """The help text and the choices."""
        return f"{self.help} Choices: {', '.join(self.choices)}." if self.choices else self.help

    @property
    def text(self) -> str:
        """The whole text: help, choices and default."""
        if self.default == "required":
            return f"Required. {self.meaning}"
        return f"{self.meaning} Default: {self.default}" if self.default else self.meaning


def _number(kind: type[int] | type[float], text: str) -> int | float:
    try:
        value: int | float = typed(text, kind, text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None
    return value


class CommandParser(argparse.ArgumentParser):
    """A parser that knows the groups of options and the essential options."""

    def __init__(self, prog: str, description: str) -> None:
        usage = f"{prog} [options]"
        super().__init__(prog, usage, description, formatter_class=HelpFormatter, add_help=False)
        for kind in (int, float):
            self.register("type", kind, partial(_number, kind))  # argparse names types of Python, such as int
        self.infos: dict[argparse.Action, OptionInfo] = {}
        self.examples: Sequence[tuple[str, str]] = ()  # (a description, the command in one or more lines)
        self.notes = ""  # lines after the options
        self.commands: dict[str, CommandParser] = {}
        self.add_argument("-h", "--help", action=_Help, help="Show this help and stop.")

    def option(
        self, flag: str, help: str, group: Group | None = None, *, essential: bool = True, shown: str = "",
        **settings: Any,
    ) -> None:  # fmt: skip
        """Adds an option. settings: those of `add_argument`. shown: the default in help, if `settings` have none."""
        default = "required" if settings.get("required") else shown or shown_default(settings.get("default"))
        choices = tuple(map(str, settings.get("choices", ())))
        self.add(OptionInfo(flag, help, default, choices, group, essential, settings.get("type") is Path), **settings)

    def add(self, info: OptionInfo, **settings: Any) -> None:
        """Adds an option that is shown as `info` says. `settings` are those of `add_argument`."""
        self.infos[self.add_argument(info.flag, help=info.text.replace("%", "%%"), **settings)] = info
        if not info.essential and "--help-all" not in self._option_string_actions:
            self.add_argument("--help-all", action=_Help, help="Show all options and stop.")

    def info(self, action: argparse.Action) -> OptionInfo:
        """The facts about an argument that was added in any way."""
        return self.infos.get(action) or _described(action)

    @property
    def arguments(self) -> list[argparse.Action]:
        """All arguments that a user can give, except those that show help."""
        return [action for action in self._actions if not isinstance(action, _Help | argparse._SubParsersAction)]

    def format_help(self, everything: bool = False) -> str:
        """The help text with the essential options, or with all options if `everything`."""
        formatter = HelpFormatter(self.prog)
        formatter.add_renderable(Text(f"usage: {self.usage}"))
        formatter.add_renderable(Text(f"\n{self.description}"))
        if self.commands:
            rows = [argparse.Action([], name, help=parser.description) for name, parser in self.commands.items()]
            _add_section(formatter, "Commands", rows)
        for title, actions in self._sections(everything).items():
            _add_section(formatter, title, actions)
        if self.examples:
            formatter.start_section("Examples")
            for what, command in self.examples:
                formatter.add_text(_example(what, command, formatter.line_width - 4))
            formatter.end_section()
        formatter.add_text(self.notes or None)
        hidden = [action for action in self.arguments if not self.info(action).essential]
        if hidden and not everything:
            total = len(self.arguments)
            formatter.add_text(f"This shows {total - len(hidden)} of {total} options. All: {self.prog} --help-all")
        text = formatter.format_help()
        return text if everything else _closed_up(text, self._sections(False))

    def _sections(self, everything: bool) -> dict[str, list[argparse.Action]]:
        """The arguments to show by title: groups in their own order, essential options first in each."""
        shown = [action for action in self.arguments if everything or self.info(action).essential]
        helps: list[argparse.Action] = [action for action in self._actions if isinstance(action, _Help)]
        groups = dict.fromkeys(type(info.group) for action in shown if (info := self.info(action)).group)
        sections: dict[str, list[argparse.Action]] = {}
        for group in (member for kind in groups if kind is not None for member in kind):
            members = [action for action in shown if self.info(action).group is group]
            sections[str(group.value)] = sorted(members, key=lambda action: not self.info(action).essential)
        rest = [action for action in shown if self.info(action).group is None]
        sections["Help" if groups else _PLAIN] = rest + helps
        return {title: actions for title, actions in sections.items() if actions}


class _Help(argparse.Action):
    """Shows help and stops. --help-all shows all options."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        everything = option == "--help-all" and isinstance(parser, CommandParser)
        text = parser.format_help(everything=True) if everything else parser.format_help()  # type: ignore[call-arg]
        parser._print_message(text, sys.stdout)
        parser.exit()


def _described(action: argparse.Action) -> OptionInfo:
    """The facts about an argument that argparse knows."""
    flag = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest).upper()
    help = (action.help or "").replace("%%", "%")
    default = "required" if action.required else shown_default(action.default)
    return OptionInfo(flag, help, default, tuple(map(str, action.choices or ())))


def shown_default(value: object) -> str:
    """A default as a user types it. "" for an option that is off or empty by default."""
    if value is None or value is False or value in (argparse.SUPPRESS, "", ()) or value == []:
        return ""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _example(what: str, command: str, width: int) -> str:
    """A description and its command. Broken lines end in a backslash, so that you can copy the command."""
    lines = [" "]
    for part in re.split(r" (?=--|> )", command):
        if len(lines[-1]) + len(part) + 3 > width and len(lines[-1]) > 1:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {part}"
    return "\n".join([textwrap.fill(what, width), *lines])


def _closed_up(text: str, titles: Collection[str]) -> str:
    """A help text without the empty lines before `titles`, except the first, so that it is short."""
    colours = r"(?:\x1b\[[\d;]*m)*"
    _, *later = titles
    return re.sub(rf"\n\n(?={colours}(?:{'|'.join(map(re.escape, later))}):)", "\n", text) if later else text


def _add_section(formatter: argparse.HelpFormatter, title: str, actions: Sequence[argparse.Action]) -> None:
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
