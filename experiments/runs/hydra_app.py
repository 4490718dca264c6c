"""The one place that knows how Hydra starts: a dataclass is the schema, a function is the application.

    @dataclass
    class CompareConfig:
        folder: str = "runs/demo"

    def compare(cfg: CompareConfig) -> dict[str, Any]: ...

    def main(argv: list[str] | None = None) -> int:
        return run_app("compare", CompareConfig, compare, argv)

`configs/compare.yaml` opens with `defaults: [compare_schema, _self_]`; groups are folders beside it and fill the fields
of the same name. The function gets a plain instance of the dataclass, so its `__post_init__` has checked the ranges.
What it returns is printed as one line of JSON, the last on stdout (`experiments.runs.output`); a multirun prints one such
line per job.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from experiments.runs.folder import NoRun
from experiments.runs.output import entry, finish
from experiments.samples.records import DataError
from hardware.datafile import DataFileError
from hardware.text import short

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130
EXIT_REQUEUE = 75
"""After SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later", which no other failure has, so that a scheduler can be told
to requeue by it (docs/howto/resume.md)."""

# Run folders are ours: Hydra writes nothing into the current folder and leaves logging alone. A sweep's own record
# (multirun.yaml) goes where nothing collects runs. Whatever the command line says about the same key wins.
QUIET = {
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.job.chdir": "false",
    "hydra.sweep.dir": "runs/.sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir": ".",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an interruption that unwinds what is in progress."""


@contextmanager
def terminating() -> Iterator[None]:
    """While it is entered, SIGTERM raises Terminated in the main thread; a handler that is there already stays."""
    try:
        free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if free:
            signal.signal(signal.SIGTERM, _raise_terminated)
    except ValueError:  # not in the main thread
        free = False
    try:
        yield
    finally:
        if free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_terminated(number: int, frame: object) -> None:
    raise Terminated


def exit_of(interruption: KeyboardInterrupt) -> int:
    """The exit code of an interruption: 130 after Ctrl-C, 75 after SIGTERM."""
    return EXIT_REQUEUE if isinstance(interruption, Terminated) else EXIT_INTERRUPTED


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the remedy."""


def run_app(
    name: str,
    schema: type,
    function: Callable[[Any], Mapping[str, Any]],
    argv: Sequence[str] | None = None,
    *,
    expected: tuple[type[Exception], ...] = (),
    tell: Callable[[Mapping[str, Any]], None] | None = None,
    command: str = "",
    configs: str = "configs",
) -> int:
    """Run `function` on the configuration Hydra composes from `configs/NAME.yaml` and `argv`; return the exit code.

    `schema` is the dataclass every key must be a field of; `argv` is what follows the command's name (None: what
    sys.argv holds); `expected` are the errors whose message says all (a missing corpus, say): no traceback for them.
    `tell` prints the document's line, with `experiments.runs.output.finish`, where not all of it matters alike.
    `command` is what the user typed, where that is not NAME; `configs` is the package that holds NAME.yaml.
    Exit codes: 0; 1 the job failed; 2 the configuration is wrong, or names a run that is not there; 130 interrupted, by
    Ctrl-C or by a job that says so itself (`status` is "interrupted"); 75 after SIGTERM. SPIKEGATE_TRACEBACK=1 shows
    tracebacks for all.
    Raises whatever `function` raises beyond that.
    """
    return entry(lambda words: _run(name, schema, function, words or (), expected, tell, command or name, configs))(argv)


def _run(
    name: str,
    schema: type,
    function: Callable[[Any], Mapping[str, Any]],
    words: Sequence[str],
    expected: tuple[type[Exception], ...],
    tell: Callable[[Mapping[str, Any]], None] | None,
    command: str,
    configs: str,
) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    register(name, schema)
    given = [_settable(word, _free(schema)) for word in words]

    shown: tuple[type[Exception], ...] = (ConfigError, *expected)
    held: list[Exception] = []

    def task(cfg: DictConfig) -> None:
        try:
            document = function(to_dataclass(cfg, schema))
        except shown as error:
            if HydraConfig.get().mode is not RunMode.RUN:  # a sweep: the other jobs run, and Hydra says which failed
                raise
            held.append(error)
            return
        if tell is None:
            finish(document, command)
        else:
            tell(document)
        if document.get("status") == "interrupted":  # what is done is saved: no further job, and the exit code says so
            raise Terminated if document.get("interrupted_by") == "SIGTERM" else KeyboardInterrupt

    verbose = os.environ.get("SPIKEGATE_TRACEBACK") == "1"
    try:
        with terminating(), _command_line(command, _with_quiet(given)):
            hydra.main(version_base="1.3", config_path=f"pkg://{configs}", config_name=name)(task)()
        if held:
            raise held[0]
    except SystemExit as stop:  # --help and argparse's own complaints
        return stop.code if isinstance(stop.code, int) else EXIT_CONFIG if stop.code else 0
    except KeyboardInterrupt as interruption:
        print(f"{command}: interrupted", file=sys.stderr)
        return exit_of(interruption)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if verbose:
            traceback.print_exc()
        print(f"{command}: {explain(error, schema)}", file=sys.stderr)
        return EXIT_CONFIG
    except expected as error:
        if verbose:
            traceback.print_exc()
        print(f"{command}: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, FileNotFoundError | NoRun | DataError | DataFileError) else EXIT_FAILED
    return 0


def quoted(value: object) -> str:
    """`value` as Hydra's command line reads it back: in quotes where it has characters that Hydra takes for its own."""
    text = str(value)
    return text if _BARE.fullmatch(text) else "'" + text.replace("'", "\\'") + "'"


def setting(key: str, value: object) -> str:
    """The word KEY=VALUE for an application's command line, its value quoted where that is needed."""
    return f"{key}={quoted(value)}"


_BARE = re.compile(r"[\w./+-]+")


def register(name: str, schema: type) -> None:
    """Make `schema` known to Hydra as `NAME_schema`, the entry that `configs/NAME.yaml` starts its defaults with."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def to_dataclass(cfg: Any, schema: type) -> Any:
    """A plain instance of `schema` from a composed configuration, with types, keys and `__post_init__` ranges checked.

    Raises ConfigError. (OmegaConf checks types on merge, but ranges only here.)
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    keys = known_keys(schema)
    _refuse_resolvers(cfg)
    for key in _walk(cfg):  # `+key=value` slips past Hydra's own check
        if key not in keys and not any(key.startswith(f"{free}.") for free in _free(schema)):
            raise ConfigError(_unknown(key, keys))
    try:
        if OmegaConf.get_type(cfg) is not schema:
            cfg = OmegaConf.merge(OmegaConf.structured(schema), cfg)
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, schema)) from error
    except ValueError as error:  # a range, from the dataclass itself
        raise ConfigError(str(error)) from error


_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")


def _refuse_resolvers(cfg: Any) -> None:
    """Raise ConfigError for a value that asks for more than another setting: the environment (`oc.env`), a clock, a call.

    A reference such as `${data.name}` reads the settings themselves and stays.
    """
    from omegaconf import OmegaConf

    waiting: list[tuple[str, Any]] = [("", OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}" if key else str(name), part) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{key}[{i}]", part) for i, part in enumerate(value)]
        elif isinstance(value, str) and (found := _RESOLVER.search(value)):
            raise ConfigError(
                f"configuration key {key!r}: {short(value)} asks for something outside of the settings (resolver "
                f"{found[1]}); write the value itself"
            )


def explain(error: BaseException, schema: type) -> str:
    """What is wrong and what to do, in one or two lines: close matches for an unknown key, the reason for the rest."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override), str(error))
    cause = _deepest(error)
    unknown = _unknown_key(error, cause)
    if unknown is not None:
        return _unknown(unknown, known_keys(schema))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: no such choice; there are {', '.join(error.options)}"
    key = getattr(cause, "full_key", None)
    text = str(cause if isinstance(getattr(cause, "msg", None), str) else error)
    reason = "; ".join(line.strip() for line in text.splitlines() if line.strip() and not _NOISE.match(line.strip()))
    if type(cause).__name__ == "MissingMandatoryValue":
        return f"configuration key {key!r} has no value; give it one on the command line: {key}=..."
    return f"configuration key {key!r}: {reason}" if key else reason


def _unreadable(word: str, said: str) -> str:
    """What to do about an override that Hydra's grammar cannot read: which key it is, and how its value is quoted."""
    key, equals, value = word.partition("=")
    reason = said.splitlines()[0] if said else "not readable"
    if not equals or not key or not value:
        return f"{short(word)}: a setting is written KEY=VALUE ({reason})"
    listed = value[0] == "[" and value[-1] == "]"
    if any(mark in value for mark in "'\"$`\\"):
        cure = "put the value in quotes of Hydra's, a quote inside it after a backslash, and the whole word in the shell's"
    elif listed:
        items = ",".join(item if item.strip().isalnum() else f"'{item.strip()}'" for item in value[1:-1].split(","))
        cure = f'write "{key}=[{items}]"'
    else:
        cure = f"write \"{key}='{value}'\""
    return (
        f"configuration key {key!r}: the value {short(value)} holds a character that Hydra reads as its own (such as = , "
        f": [ {{ or a space), so it needs quotes inside those of the shell: {cure} ({reason})"
    )


@functools.cache
def known_keys(schema: type) -> tuple[str, ...]:
    """Every dotted key of `schema`, inner nodes included."""
    from omegaconf import OmegaConf

    return tuple(_walk(OmegaConf.structured(schema)))


def _walk(node: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig

    for key in node:
        yield f"{prefix}{key}"
        inner = node._get_node(key)
        if isinstance(inner, DictConfig) and not (inner._is_none() or inner._is_missing() or inner._is_interpolation()):
            yield from _walk(inner, f"{prefix}{key}.")


@functools.cache
def _free(schema: type) -> tuple[str, ...]:
    """Dotted keys that are plain dictionaries (`dict[str, ...]`): whatever lies under them is the user's."""
    from omegaconf import DictConfig, OmegaConf

    cfg = OmegaConf.structured(schema)
    nodes = {key: OmegaConf.select(cfg, key) for key in _walk(cfg) if not OmegaConf.is_missing(cfg, key)}
    return tuple(key for key, node in nodes.items() if isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict)


def _settable(word: str, free: Sequence[str]) -> str:
    """`KEY=VALUE` as Hydra takes it where KEY is a plain dictionary or lies in one: with its "add or override" prefix."""
    key, equals, _ = word.partition("=")
    return f"++{word}" if equals and any(f"{key}.".startswith(f"{name}.") for name in free) else word


def _unknown(key: str, keys: Sequence[str]) -> str:
    close = _close(key, keys)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known keys: {', '.join(_top(keys))}"
    return f"unknown configuration key {key!r}; {hint} (--cfg job prints all of them)"


_NOISE = re.compile(r"(full_key|object_type|reference_type)\s*[:=]|To append to your config")
_NOT_FOUND = re.compile(r"[Kk]ey '([^']+)' (?:is )?not in |Could not (?:override|delete) '([^']+)'")


def _unknown_key(error: BaseException, cause: BaseException) -> str | None:
    if type(cause).__name__ not in {"ConfigAttributeError", "ConfigKeyError", "ConfigCompositionException"}:
        return None
    found = _NOT_FOUND.search(str(cause)) or _NOT_FOUND.search(str(error))
    if found is None:
        return None
    return str(getattr(cause, "full_key", None) or found.group(1) or found.group(2))


def _deepest(error: BaseException) -> BaseException:
    seen = error
    while seen.__cause__ is not None:
        seen = seen.__cause__
    return seen


def _close(key: str, keys: Sequence[str]) -> list[str]:
    """Known keys that begin with `key` or look like it, whole or by their last part; not the groups it lies in."""
    keys = [known for known in keys if not key.startswith(f"{known}.")]
    longer = [known for known in keys if known.startswith(key)]
    whole = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    last = key.rsplit(".", 1)[-1]
    tails = {known.rsplit(".", 1)[-1] for known in keys}
    by_tail = difflib.get_close_matches(last, sorted(tails), n=2, cutoff=0.75)
    same_tail = [known for tail in by_tail for known in keys if known.rsplit(".", 1)[-1] == tail]
    return list(dict.fromkeys([*longer, *whole, *same_tail]))[:3]


def _top(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if "." not in key]


def _with_quiet(given: Sequence[str]) -> list[str]:
    """`given` with the QUIET overrides it does not set itself.

    They go right before the first override: argparse takes overrides only in one stretch.
    """
    taken = {word.lstrip("+~").split("=", 1)[0] for word in given}
    quiet = [f"{key}={value}" for key, value in QUIET.items() if key not in taken]
    overrides = (i for i, word in enumerate(given) if not word.startswith("-") and (word[:1] == "~" or "=" in word))
    at = next(overrides, 0)
    return [*given[:at], *quiet, *given[at:]]


@contextmanager
def _command_line(name: str, words: Sequence[str]) -> Iterator[None]:
    """Lend Hydra the sys.argv it reads and HYDRA_FULL_ERROR, which makes it raise instead of printing and exiting."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"spikegate {name}", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
