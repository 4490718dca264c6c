#!/usr/bin/env bash
# A Trainer with a loss function of one's own stops balancing the experts of a mixture.
#
# Version: transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, CPU.
# Expected: compute_loss_func replaces the cross-entropy. A mixture of experts whose config asks for the balance of its router
#     (output_router_logits, router_aux_loss_coef) is still trained on that balance.
# Seen: the balance is added by the model only where it gets labels, and with compute_loss_func the Trainer takes the labels
#     out of the batch. The coefficient then changes nothing. The model's output still holds `aux_loss`, so the function can
#     add it; nothing says that it must.
# Output:
#     loss of the model: weights after two steps with coefficients 0 and 10 differ
#     compute_loss_func, the same cross-entropy: weights after two steps with coefficients 0 and 10 are equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$venv" -W ignore - <<'END'
import logging
import tempfile

import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
tokens = torch.randint(0, 20, (8, 8))
data = [{"input_ids": row, "labels": row} for row in tokens]


def cross_entropy(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def weights(loss, coefficient):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=coefficient,
    )
    model = MixtralForCausalLM(config)
    arguments = TrainingArguments(
        tempfile.mkdtemp(dir="."), per_device_train_batch_size=4, max_steps=2, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", optim="sgd", learning_rate=0.5, seed=1,
    )
    trainer = Trainer(model, arguments, train_dataset=data, compute_loss_func=loss)
    trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    trainer.train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


for name, loss, changes in (("loss of the model", None, True), ("compute_loss_func, the same cross-entropy", cross_entropy, False)):
    equal = torch.equal(weights(loss, 0.0), weights(loss, 10.0))
    print(f"{name}: weights after two steps with coefficients 0 and 10 {'are equal' if equal else 'differ'}")
    assert equal != changes, f"behaviour changed: {name}"
END
