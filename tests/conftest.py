"""Every test, every fixture and every module of tests begins with a seed of its own, so that what one draws depends neither
on what ran before it nor on which worker it runs on.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Generator
from typing import Any

import pytest


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
def pytest_runtest_call(item: pytest.Item) -> None:
    seed(item.nodeid)
