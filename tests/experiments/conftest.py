"""What the entry points' tests share."""

from __future__ import annotations

import os

import pytest

from neuro.simulators import lava_client


@pytest.fixture(scope="module")
def lava():
    """Lava's interpreter; skips without it, or fails where SPIKEGATE_REQUIRE lists lava."""
    try:
        return lava_client.find_python()
    except lava_client.LavaUnavailable as error:
        if "lava" in os.environ.get("SPIKEGATE_REQUIRE", "").split(","):
            pytest.fail(f"SPIKEGATE_REQUIRE asks for Lava: {error}")
        pytest.skip(str(error))
