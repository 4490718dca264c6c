"""Methods by name through the callback of the Hugging Face Trainer: they train, and an interrupted training goes on."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch

from sparse_update.library.callbacks import lightning_callback, trainer_callback
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.test_callbacks import gpt2, hf_run

GIVEN = {
    "rho1": {},
    "lisa": {"weights": {"change_every_steps": 2}},
    "frugal": {"weights": {"change_every_steps": 2, "block_rows": 4}},
    "vcas": {"gradient": {"every": 2, "alpha": 0.2, "beta": 0.6}},
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_method_trains_and_resumes_in_the_trainer(name, tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        _, start = gpt2()
        reference = None
        if name == "rho1":
            reference = copy.deepcopy(start)
            with torch.no_grad():
                reference.transformer.wte.weight.add_(1.0)

        def callback():
            return trainer_callback({"method": name, **GIVEN[name]}, reference)

        first, seen = callback(), []
        begin = first.holder.start
        first.holder.start = lambda *given: (begin(*given), seen.append(first.gate))
        whole, trainer = hf_run(tmp_path / "whole", first, 6)
        again, _ = hf_run(tmp_path / "again", callback(), 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert (seen[0].cfg.method, seen[0].cfg.total_steps) == (name, 6)  # as the trainer knows it
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for (label, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), label


def test_a_callback_asks_for_the_reference_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(GateError, match="reference=MODULE"):
            hf_run(tmp_path, trainer_callback({"method": "rho1"}), 1)
    pytest.importorskip("pytorch_lightning", reason="needs the extra lightning (pytorch_lightning)")
    with pytest.raises(GateError, match="reference=MODULE"):
        lightning_callback({"method": "rho1"}).holder.start(gpt2()[1], [])
    given = gpt2()[1]
    callback = lightning_callback({"method": "rho1"}, given)
    callback.holder.start(gpt2()[1], [])
    assert callback.gate.row_loss.reference is given
    callback.holder.end()
