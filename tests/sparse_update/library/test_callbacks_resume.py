"""Trainings that were stopped and resumed, and clipped ones, in the Hugging Face Trainer and in Lightning, bit by bit."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sparse_update.library.callbacks import lightning_callback, load_gate_state, trainer_callback
from sparse_update.library.linear import GateError
from tests.sparse_update.library.loops import COLUMNS, CONFIGS, LAYERS, ROWS, STRIPS, T, flat, groups, small
from tests.sparse_update.library.models import llama

ROTATING = {"weights": STRIPS | {"policy": "random"}}


@pytest.fixture(autouse=True)
def quiet():
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: workers, pinning, loggers
        yield
    logging.disable(level)


# the Hugging Face Trainer


def trainer_of(folder, callback, **given):
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    pytest.importorskip("accelerate", reason="needs the extra hub (accelerate)")
    torch.manual_seed(0)
    model = llama()
    usual = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(usual | given))
    data = [{"input_ids": row[:T], "labels": row[:T]} for row in ROWS.flatten(0, 1)[:24]]
    extra = {"callbacks": [callback], "compute_loss_func": callback.loss} if callback else {}
    return transformers.Trainer(model, arguments, train_dataset=data, **extra)


def trained(folder, config, resume=None, **given):
    callback = trainer_callback(config) if config is not None else None
    trainer = trainer_of(folder, callback, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("rotating rows", "scored layers")])
def test_the_trainer_resumes_bit_by_bit(name, tmp_path):
    more = {"gradient_accumulation_steps": 2, "optim": "adafactor"} if name.startswith("two scored") else {}
    whole = trained(tmp_path, CONFIGS[name], **SAVING, **more)
    again = trained(tmp_path, CONFIGS[name], str(tmp_path / "checkpoint-3"), **SAVING, **more)
    assert torch.equal(flat(again.model), flat(whole.model))
    gone = [entry.get("grad_norm") for entry in whole.state.log_history][3:6]
    assert [entry.get("grad_norm") for entry in again.state.log_history][3:6] == gone


def test_groups_of_a_resumed_trainer_keep_decay_and_rate(tmp_path):
    trained(tmp_path, ROTATING, **SAVING)
    callback = trainer_callback(ROTATING)
    trainer = trainer_of(tmp_path, callback, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    decayed, rest = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert sum(p.dim() > 1 for p in decayed["params"]) == 16
    assert all(p.dim() == 1 for p in rest["params"])


def test_the_checkpoint_folder_holds_the_gates_state(tmp_path):
    config = {"weights": STRIPS | {"policy": "energy"}}
    trained(tmp_path / "a", config, save_only_model=True, **SAVING)
    folder = tmp_path / "a" / "checkpoint-3"
    state = load_gate_state(str(folder / "gate.safetensors"))
    assert (state["steps"], state["subset"]["turn"]) == (3, 1)
    assert not (folder / "optimizer.pt").exists()
    callback = trainer_callback(config)
    start, seen = callback.holder.start, []
    callback.holder.start = lambda *given: (start(*given), seen.append(callback.gate.state_dict()))
    trainer = trainer_of(tmp_path / "a", callback)
    trainer.train(resume_from_checkpoint=str(folder))
    assert seen[0]["steps"] == 3
    assert all(torch.equal(v, state["subset"]["score"][n]) for n, v in seen[0]["subset"]["score"].items())
    # without any state what was seen is lost, and that is said
    shutil.move(folder, tmp_path / "checkpoint")
    Path(tmp_path / "checkpoint" / "gate.safetensors").unlink()
    with pytest.raises(GateError, match=r"'energy' chooses by what it saw, and the checkpoint of step 3 holds no state"):
        trained(tmp_path / "b", config, str(tmp_path / "checkpoint"))


def test_a_trainers_checkpoint_of_other_settings_is_refused(tmp_path):
    trained(tmp_path, {"weights": STRIPS | {"strips": 2}}, **SAVING)
    for weights, text in (
        (STRIPS, r"weights\.strips was 2 when this state was saved and is 1"),
        (COLUMNS | {"strips": 2}, r"weights\.kind was 'blocks' .* and is 'block_columns'"),
        (STRIPS | {"strips": 2, "change_every_steps": 5}, r"weights\.change_every_steps was 2 .* and is 5"),
    ):
        with pytest.raises(GateError, match=text):
            trained(tmp_path, {"weights": weights}, str(tmp_path / "checkpoint-3"))


def test_a_trainer_trains_twice_and_clips_as_before(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra hub (accelerate)")
    clip = accelerate.Accelerator.clip_grad_norm_
    callback = trainer_callback(ROTATING)
    trainer = trainer_of(tmp_path, callback, max_steps=3, **SAVING)
    trainer.train()
    assert accelerate.Accelerator.clip_grad_norm_ is clip
    middle = flat(trainer.model)
    trainer.train()
    assert callback.holder.state["steps"] == 6
    assert not torch.equal(flat(trainer.model), middle)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # an error leaves the gate on; the next training takes it off first
    loss = trainer.compute_loss_func
    trainer.compute_loss_func = lambda *a, **o: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.compute_loss_func = loss
    trainer.train()
    assert callback.gate is None
    assert accelerate.Accelerator.clip_grad_norm_ is clip


@pytest.mark.parametrize(("weights", "clip"), [(STRIPS, 0.0), (STRIPS, 0.1), (COLUMNS, 0.1)])
def test_the_trainer_with_everything_active_trains_plainly(weights, clip, tmp_path):
    given = {"max_grad_norm": clip, "max_steps": 3}
    if clip:
        given |= {"optim": "sgd", "learning_rate": 0.1}
    plain = trained(tmp_path, None, **given)
    gated = trained(tmp_path, {"weights": weights | {"active_fraction": 1.0}}, **given)
    assert torch.equal(flat(gated.model), flat(plain.model))
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (plain, gated)]
    assert norms[0] == norms[1]
    assert len(norms[0]) == 3


# Lightning


def lightning(folder, config, checkpoint=None, manual=False, clip=0.5, steps=6, **given):
    pl = pytest.importorskip("pytorch_lightning", reason="needs the extra lightning")
    callback = None if config is None else lightning_callback(config)

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.automatic_optimization = small(), not manual

        def training_step(self, batch, number):
            logits, labels = self.model(batch[:, :-1]), batch[:, 1:]
            if callback is None:
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            else:
                loss = callback.loss(logits, labels)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=clip)
            optimizer.step()
            self.lr_schedulers().step()
            return None

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(groups(self.named_parameters()), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    save = [pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)] if not checkpoint else []
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(save),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([callback] if callback else []), *save],
        default_root_dir=folder,
        gradient_clip_val=None if manual else clip,
        **given,
    )
    # an epoch ends where the checkpoint is written: Lightning begins its loader anew
    data = DataLoader(ROWS[: 3 * given.get("accumulate_grad_batches", 1)], batch_size=None)
    task = Task()
    trainer.fit(task, data, ckpt_path=checkpoint, **({"weights_only": True} if checkpoint else {}))
    return task, trainer, callback


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("two random columns, sequences", {"accumulate_grad_batches": 2}),
        ("two scored rows, random tokens", {"manual": True}),
        ("scored layers", {}),
        ("random layers, random sequences", {"manual": True}),
    ],
)
def test_lightning_resumes_bit_by_bit(name, given, tmp_path):
    whole, _, callback = lightning(tmp_path, CONFIGS[name], **given)
    assert callback.holder.state["steps"] == 6
    again, _, callback = lightning(tmp_path, CONFIGS[name], tmp_path / "step=3.ckpt", **given)
    assert callback.holder.state["steps"] == 6
    assert torch.equal(flat(again), flat(whole))


@pytest.mark.parametrize("manual", [False, True])
def test_lightning_clips_as_plain_training_with_everything_active(manual, tmp_path):
    plain, _, _ = lightning(tmp_path, None, manual=manual, clip=0.05, steps=3)
    gated, _, _ = lightning(tmp_path, {"weights": STRIPS | {"active_fraction": 1.0}}, manual=manual, clip=0.05, steps=3)
    assert torch.equal(flat(gated), flat(plain))


def test_lightning_refuses_other_settings_and_leaves_the_model_plain(tmp_path):
    lightning(tmp_path, ROTATING, steps=3)
    with pytest.raises(GateError, match=r"weights\.kind was 'blocks' when this state was saved and is 'layers'"):
        lightning(tmp_path, {"weights": LAYERS}, tmp_path / "step=3.ckpt")


def test_lightning_leaves_out_steps_that_a_scaler_left_out():
    callback = lightning_callback({"weights": STRIPS})

    class Part:
        def __init__(self, **given):
            vars(self).update(given)

    model = small()
    scales = [8.0]
    scaler = Part(get_scale=lambda: scales[-1])
    optimizer = torch.optim.AdamW(groups(model.named_parameters()))
    trainer = Part(
        optimizers=[optimizer], global_step=0, estimated_stepping_batches=8, precision_plugin=Part(scaler=scaler)
    )
    callback.on_train_start(trainer, model)
    steps = []
    for scale in (8.0, 4.0, 4.0, 8.0, 2.0):
        scales.append(scale)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer)
        steps.append(callback.gate.steps)
    assert steps == [1, 1, 2, 3, 3]
    callback.on_train_end(trainer, model)


def test_a_file_of_something_else_is_no_gates_state(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"other": json.dumps({})})
    with pytest.raises(GateError, match=r"x\.safetensors is no state of a gate"):
        load_gate_state(str(tmp_path / "x.safetensors"))
