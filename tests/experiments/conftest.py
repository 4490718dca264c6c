"""What the entry points' tests share."""

from __future__ import annotations

import pytest

from neuro.simulators.lava import client as lava_client
from tests.environments import missing


@pytest.fixture(scope="module")
def lava():
    """Lava's interpreter; skips without it, or fails where SPIKEGATE_REQUIRE lists lava."""
    try:
        return lava_client.find_python()
    except lava_client.LavaUnavailable as error:
        missing("lava", str(error))
