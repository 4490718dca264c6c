"""The gate as a callback: a few CPU steps of Lightning and of the Hugging Face Trainer."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from sparse_update.library.attach import attach
from sparse_update.library.callbacks import lightning_callback, trainer_callback
from sparse_update.library.tracking.rows import GateError
from sparse_update.transformer import ModelConfig, Transformer

T, V = 12, 41
CONFIG = {
    "backward": {"unit": "token", "keep_fraction": 0.5},
    "weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 2},
}


def rows(n=16):
    return torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: workers, pinning, loggers
        yield


def gpt2():
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    pytest.importorskip("accelerate", reason="needs the extra hub (accelerate)")
    torch.manual_seed(0)
    cfg = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=V, n_positions=T, bos_token_id=0, eos_token_id=0
    )
    cfg.attn_pdrop = cfg.embd_pdrop = cfg.resid_pdrop = 0.0
    return transformers, transformers.GPT2LMHeadModel(cfg)


def test_a_gate_that_keeps_all_takes_the_trainers_own_step(tmp_path):
    plain = {"optim": "sgd", "max_grad_norm": 0.0}
    own, _ = hf_run(tmp_path / "own", None, 1, **plain)
    kept, _ = hf_run(tmp_path / "kept", trainer_callback({}), 1, **plain)
    _, start = gpt2()
    moved = 0
    for name, p in own.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], p, rtol=1e-5, atol=1e-7)
        moved += not torch.equal(p, start.state_dict()[name])
    assert moved > 10


def hf_run(folder, callback, steps, resume=None, loss=True, **given):
    transformers, model = gpt2()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        **given,
    )
    data = [{"input_ids": row, "labels": row} for row in rows(4)] * 6
    extra = {"compute_loss_func": callback.loss} if loss and callback else {}
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback] if callback else [], **extra)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_hugging_face_trainer_trains_strips_and_resumes(tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    callback = trainer_callback(CONFIG)
    seen = []
    start, step = callback.holder.start, callback.holder.stepped
    callback.holder.start = lambda *a: (start(*a), seen.append(callback.holder.gate))[0]
    callback.holder.stepped = lambda o, how: (
        seen.append({(n, i): leaf.shape for (n, i), leaf in callback.holder.gate.turns.strips.leaves.items()}),
        step(o, how),
    )[1]
    _, before = gpt2()
    model, trainer = hf_run(tmp_path / "whole", callback, 6)
    gate = seen[0]
    assert gate.steps == 6
    assert gate.losses == 6
    assert gate.turns.subset.turn == 3
    assert len(seen) == 7
    assert all(shapes for shapes in seen[1:])
    assert not any("forward" in vars(m) for m in model.modules())  # detached
    assert all(p.requires_grad for p in model.parameters())
    changed = [n for n, p in model.state_dict().items() if not torch.equal(p, before.state_dict()[n])]
    assert any("c_fc.weight" in n for n in changed)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again, _ = hf_run(tmp_path / "again", trainer_callback(CONFIG), 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    for name, p in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], p, rtol=1e-5, atol=1e-7)


def test_one_norm_clips_strips_and_the_rest(tmp_path):
    callback = trainer_callback({"weights": CONFIG["weights"]})
    norms, step = [], callback.holder.stepped

    def look(optimizers, how):
        norms.append(torch.stack([p.grad.norm() for p in callback.gate.parameters()]).norm().item())
        step(optimizers, how)

    callback.holder.stepped = look
    hf_run(tmp_path, callback, 2, max_grad_norm=0.01)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_hugging_face_accumulation_equals_one_large_batch(tmp_path):
    cfg = {"backward": {"unit": "token", "keep_fraction": 0.5}}
    one, _ = hf_run(tmp_path / "a", trainer_callback(cfg), 1, optim="sgd", max_grad_norm=0.0)
    transformers_args = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    callback = trainer_callback(cfg)
    transformers, model = gpt2()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "b"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **transformers_args,
    )
    data = [{"input_ids": row, "labels": row} for row in rows(4)] * 6
    transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=[callback], compute_loss_func=callback.loss
    ).train()
    for name, p in one.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], p, rtol=1e-5, atol=1e-6)


def test_a_trainer_without_the_loss_is_told(tmp_path):
    with pytest.raises(GateError, match=r"compute_loss_func=callback\.loss"):
        hf_run(tmp_path, trainer_callback(CONFIG), 2, loss=False)


def lightning_run(folder, callback, steps, checkpoint=None, use=True, **given):
    pl = pytest.importorskip("pytorch_lightning", reason="needs the extra lightning")
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = Transformer(ModelConfig(width=16, layers=2, heads=2, context=T, vocab_size=V))
            self.losses = []

        def training_step(self, batch, number):
            logits = self.model(batch[:, :-1])
            loss = callback.loss(logits, batch[:, 1:]) if use else logits.square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    task = Task()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
        **given,
    )
    trainer.fit(
        task,
        DataLoader(list(rows(4)) * 8, batch_size=4),
        ckpt_path=checkpoint,
        **({"weights_only": True} if checkpoint else {}),
    )
    return task, trainer


def test_lightning_trains_strips_and_resumes(tmp_path):
    callback = lightning_callback(CONFIG)
    whole, _ = lightning_run(tmp_path, callback, 6)
    assert callback.holder.gate is None
    assert callback.holder.state["steps"] == 6
    assert callback.holder.state["subset"]["turn"] == 3
    assert not any("forward" in vars(m) for m in whole.modules())
    assert whole.losses[-1] < whole.losses[0]
    callback = lightning_callback(CONFIG)
    _, trainer = lightning_run(tmp_path, callback, 3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    callback = lightning_callback(CONFIG)
    again, _ = lightning_run(tmp_path, callback, 6, checkpoint=tmp_path / "half.ckpt")
    assert callback.holder.state["steps"] == 6
    assert again.losses == pytest.approx(whole.losses[3:], rel=1e-5)


def test_lightning_counts_optimizer_steps_and_asks_for_the_loss(tmp_path):
    callback = lightning_callback(CONFIG)
    lightning_run(tmp_path, callback, 3, accumulate_grad_batches=2)
    assert callback.holder.state["steps"] == 3
    with pytest.raises(GateError, match=r"return callback\.loss"):
        lightning_run(tmp_path, lightning_callback(CONFIG), 2, use=False)


def test_callbacks_refuse_what_they_cannot_do():
    callback = lightning_callback({"before": {"signal": "random", "keep_fraction": 0.5}})
    model = Transformer(ModelConfig(width=16, layers=2, heads=2, context=T, vocab_size=V))
    with pytest.raises(ValueError, match="exchange the data loader"):
        callback.holder.start(model, [])
    with pytest.raises(ValueError, match="no setting of the gate"):
        trainer_callback({"weight": {}})
    # before and after a training the callback's loss is the plain one, as in evaluation
    x = rows(4)
    plain = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(lightning_callback(CONFIG).loss(model(x[:, :-1]), x[:, 1:]), plain)
    gate = attach(copy.deepcopy(model))
    gate.detach()
