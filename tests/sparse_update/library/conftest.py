"""Every model of `models.py` in turn."""

from __future__ import annotations

import pytest
import torch

from tests.sparse_update.library.models import MODELS


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(3)
    return MODELS[request.param]().double().train()
