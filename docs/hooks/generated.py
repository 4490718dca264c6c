"""Directives that write parts of the site from the code at build time, so that they cannot be stale.

{public-names} neuro              every public name of a package with its docstring, and names given by their module
{settings} experiments.train:TrainConfig    a table of keys, types, defaults and meanings, one per group
{choices} gate                    the shipped files of a configuration group, each with its first line
{shipped} gate/rho1               one such file as it is
{command-line}                    the help of every `spikegate` command
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FLOORS = ("experiments", "sparse_update", "neuro", "hardware")
HELP_COLUMNS = "100"
UNDER = {"bench": ("experiments.bench", "BENCHES"), "study": ("experiments.study", "STUDIES")}
"""Commands with names under them: where the names are."""


class Written(SphinxDirective):
    """A directive whose content is Markdown that `markdown()` returns."""

    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        holder = nodes.container()
        lines = self.markdown().splitlines()
        self.state.nested_parse(StringList(lines, source=self.env.docname), self.content_offset, holder, match_titles=True)
        return holder.children

    def markdown(self) -> str:
        raise NotImplementedError


# --- names and their docstrings


class PublicNames(Written):
    """Argument: a package. Content: further `module:name`, one a line, or `module:*` for all that the module defines."""

    def markdown(self) -> str:
        package = importlib.import_module(self.arguments[0])
        homes: dict[str, list[str]] = {}
        for name in sorted(package.__all__):
            value = getattr(package, name)
            home = getattr(value, "__module__", None) or package.__name__
            homes.setdefault(home if home.startswith(package.__name__) else package.__name__, []).append(name)
        for line in filter(None, map(str.strip, self.content)):
            module, _, name = line.partition(":")
            names = _defined_in(module) if name == "*" else [name]
            homes.setdefault(module, []).extend(name for name in names if name not in homes.get(module, []))
        return "\n".join(_section(home, homes[home]) for home in sorted(homes))


def _defined_in(module: str) -> list[str]:
    found = importlib.import_module(module)
    return [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module
    ]


def _section(module: str, names: list[str]) -> str:
    found = importlib.import_module(module)
    summary = (inspect.getdoc(found) or "").split("\n\n")[0]
    lines = [f"## `{module}`", "", summary, "", "```{eval-rst}"]
    for name in names:
        value = getattr(found, name)
        kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
        kind = "exception" if kind == "class" and issubclass(value, BaseException) else kind
        lines += [f".. auto{kind}:: {module}.{name}", ""]
    return "\n".join([*lines, "```", ""])


# --- settings


class Settings(Written):
    """Argument: `module:Class`, the dataclass that an application takes its settings from."""

    def markdown(self) -> str:
        module, _, name = self.arguments[0].partition(":")
        schema = getattr(importlib.import_module(module), name)
        plain, groups = [], []
        for field in dataclasses.fields(schema):
            value = _default(field)
            (groups if dataclasses.is_dataclass(value) else plain).append((field, value))
        parts = [_table(schema, [field for field, _ in plain], "")]
        for field, value in groups:
            doc = inspect.cleandoc(type(value).__doc__ or "").split("\n\n")[0]
            parts += [f"## `{field.name}`", "", doc, ""]
            parts += [_table(type(value), list(dataclasses.fields(value)), f"{field.name}.")]
        return "\n".join(parts)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _table(schema: type, fields: list[dataclasses.Field[Any]], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        value = _default(field)
        shown = "required" if value in (dataclasses.MISSING, "???") else f"`{value!r}`"
        doc = " ".join(_meaning(schema, field.name).split())
        rows.append("| " + " | ".join(map(_cell, (f"`{prefix}{field.name}`", f"`{field.type}`", shown, doc))) + " |")
    return "\n".join([*rows, ""])


def _meaning(schema: type, name: str) -> str:
    for owner in schema.__mro__:
        if dataclasses.is_dataclass(owner):
            docs = _attribute_docs(owner.__module__)
            if (owner.__qualname__, name) in docs:
                return "\n".join(docs[owner.__qualname__, name])
    return ""


@functools.cache
def _attribute_docs(module: str) -> dict[tuple[str, str], list[str]]:
    return ModuleAnalyzer.for_module(module).find_attr_docs()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


class Choices(Written):
    """Argument: a configuration group."""

    def markdown(self) -> str:
        group = self.arguments[0]
        files = sorted(path for path in CONFIGS.rglob("*.yaml") if group in (path.parent.name, path.parent.parent.name))
        if not files:
            raise self.error(f"no files of the group {self.arguments[0]!r} under {CONFIGS.name}/")
        rows = ["| choice | what it is |", "|---|---|"]
        typed = "spikegate sweep {}" if self.arguments[0] == "sweep" else self.arguments[0] + "={}"
        rows += [f"| `{typed.format(path.stem)}` | {_cell(_comment(path))} |" for path in files]
        return "\n".join([*rows, ""])


def _comment(path: Path) -> str:
    """The leading comment of a settings file, commands apart."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if text and not text.startswith(("@package", "python -m", "spikegate ")):
            lines.append(text)
    return " ".join(lines)


class Shipped(Written):
    """Argument: `group/name`. The file as it is shipped."""

    def markdown(self) -> str:
        group, _, name = self.arguments[0].partition("/")
        found = [path for path in CONFIGS.rglob(f"{name}.yaml") if path.parent.name == group]
        if len(found) != 1:
            raise self.error(f"{len(found)} shipped files are called {self.arguments[0]!r}")
        return f"```yaml\n{found[0].read_text(encoding='utf-8').rstrip()}\n```\n"


# --- folders


class Rooms(Written):
    """A table per floor: folder, purpose."""

    def markdown(self) -> str:
        parts = []
        for floor in FLOORS:
            parts += [f"## `{floor}/`", "", _purpose(ROOT / floor), "", "| folder | what it is for |", "|---|---|"]
            inner = sorted(path.parent for path in (ROOT / floor).glob("*/__init__.py"))
            parts += [f"| `{floor}/{path.name}/` | {_cell(_purpose(path))} |" for path in inner]
            parts.append("")
        return "\n".join(parts)


def _purpose(folder: Path) -> str:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


# --- commands


class CommandLine(Written):
    """The help of `spikegate` and of each of its commands."""

    def markdown(self) -> str:
        parts = []
        for command in ("", *_commands()):
            parts += [f"## `{f'spikegate {command}'.strip()}`", "", "```text", _help(command), "```", ""]
        return "\n".join(parts)


def _commands() -> Iterator[str]:
    """The names that the top parser takes, caught at the moment it would print its help."""
    caught: list[argparse.ArgumentParser] = []
    with mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: caught.append(parser)):
        _call("--help")
    for action in caught[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices:
                yield command
                module, names = UNDER.get(command, ("", ""))
                yield from (
                    f"{command} {name}" for name in (getattr(importlib.import_module(module), names) if module else ())
                )


def _help(command: str) -> str:
    return _call(*command.split(), "--help").strip()


def _call(*words: str) -> str:
    cli = importlib.import_module("experiments.cli")
    out = io.StringIO()
    quiet = {"COLUMNS": HELP_COLUMNS, "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, quiet), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(list(words))
    return out.getvalue()


_CODE_OR_MARK = re.compile(r"(`[^`]*`)|\|(?=\S)|(?<=\S)\||\*\*(?=\w)")


def _escape_marks(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Bars as in |x| and stars as in **options are meant: reStructuredText would look for a substitution or bold text."""
    lines[:] = [_CODE_OR_MARK.sub(lambda found: found[1] or re.sub(r"(.)", r"\\\1", found[0]), line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _escape_marks, priority=900)
    for name, directive in (
        ("public-names", PublicNames),
        ("settings", Settings),
        ("choices", Choices),
        ("shipped", Shipped),
        ("command-line", CommandLine),
        ("rooms", Rooms),
    ):
        app.add_directive(name, directive)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
