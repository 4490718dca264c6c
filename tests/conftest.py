"""Every test, every fixture and every module of tests begins with a seed of its own, so that what one draws depends neither
on what ran before it nor on which worker it runs on. A run ends with what it left out and why.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import zlib
from collections.abc import Generator
from typing import Any

import pytest

from tests.report import grouped, left_out, soak_table

SOAK = pytest.StashKey[int]()
MODULES_AT_ONCE = 100
"""So many newly loaded modules are set aside from garbage collection"""
_loaded = 0

for _size in ("COLUMNS", "LINES"):  # readline puts the terminal's size there, and commands would fold their tables to it
    os.environ.pop(_size, None)


def seed(name: str) -> None:
    """Global generators of Python and, where it is loaded, torch, from a name. Different names give different draws."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(number)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    if isinstance(collector, pytest.Module):  # its import may draw, for parameters of tests
        seed(collector.nodeid)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    seed(f"{fixturedef.baseid}::{fixturedef.argname}::{getattr(request, 'param_index', 0)}")
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Modules stay, and so do the tests that were collected: a full collection, as Hugging Face's Trainer asks for at every
    end, would walk through a million objects of theirs each time."""
    global _loaded
    if len(sys.modules) > _loaded + MODULES_AT_ONCE:
        gc.collect()
        gc.freeze()
        _loaded = len(sys.modules)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that processes which share the work end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_deselected(items: list[pytest.Item]) -> None:
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config = soak[0].config
        config.stash[SOAK] = config.stash.get(SOAK, 0) + len(soak)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # there in xdist's workers alone
    if output is not None:
        output["soak"] = session.config.stash.get(SOAK, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker of xdist collects all tests, so the largest number is that of the run."""
    told = getattr(node, "workeroutput", {}).get("soak", 0)
    node.config.stash[SOAK] = max(node.config.stash.get(SOAK, 0), told)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None, Any, Any]:
    """After all that pytest itself and other plugins tell, right before the closing line."""
    result = yield
    if table := soak_table(terminalreporter.stats):
        terminalreporter.section("faults and inputs of the long tests")
        for line in table:
            terminalreporter.write_line(line)
    lines = grouped(left_out(terminalreporter.stats))
    if soak := config.stash.get(SOAK, 0):
        lines.append(f"left out {soak:2}  marked soak; `make soak` runs them")
    if lines:
        terminalreporter.section("left out and warned of")
        for line in lines:
            terminalreporter.write_line(line)
    return result
