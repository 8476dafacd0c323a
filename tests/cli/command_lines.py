"""The commands that a Markdown page shows, and whether `manta` and `ray` have them, with their options."""

import re
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

import typer.main
import yaml

from jobs.cli import app
from jobs.commands.submission import Asked


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, also those inside a list."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(text) for kind, text in fenced if kind == language]


def lines_of(page: str, program: str) -> list[str]:
    """The lines of blocks without a language that start a program; a line that ends in a backslash goes on."""
    text = "\n".join(blocks(page)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith(f"{program} ")]


def parse(command: Any, arguments: Sequence[str]) -> Any:
    """The context of the innermost command. Raises click's usage error for what it does not have."""
    context = command.make_context("manta", [*arguments], resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, rest, parent=context)
    return context


def parse_manta(line: str) -> None:
    """Raise where `manta` would not take a line, or the command that it submits."""
    context = parse(typer.main.get_command(app), shlex.split(line, comments=True)[1:])
    if context.parent.info_name == "submit":
        context = parse_submitted(context)
    for pair in context.params.get("set_") or []:
        yaml.safe_load(pair.partition("=")[2])


def parse_ray(line: str) -> None:
    """Raise where `ray` would not take a line."""
    from ray.scripts.scripts import cli

    parse(cli, shlex.split(line, comments=True)[1:])


def parse_submitted(context: Any) -> Any:
    """The same of what is submitted."""
    asked = Asked.of(context.info_name, context.params["arguments"])
    context.params = dict(asked.options)
    return context
