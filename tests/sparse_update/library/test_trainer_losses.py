"""The Hugging Face Trainer's callback: which labels belong to which logits, and a router's balance."""

from __future__ import annotations

import tempfile

import pytest
import torch

from sparse_update.library.callbacks import trainer_callback

transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
V = 23


def t5():
    cfg = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(cfg)


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    cfg = transformers.BertConfig(vocab_size=V, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return transformers.BertForMaskedLM(cfg)


def classifier():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
    cfg = transformers.BertConfig(vocab_size=V, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return transformers.BertForSequenceClassification(cfg)


def mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    cfg = transformers.MixtralConfig(
        vocab_size=V,
        num_key_value_heads=1,
        num_local_experts=3,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        **sizes,
    )
    return transformers.MixtralForCausalLM(cfg)


def data(model):
    made = torch.Generator().manual_seed(2)
    ids = torch.randint(1, V, (16, 8), generator=made)
    labels = torch.randint(0, 3, (16,), generator=made) if "Sequence" in type(model).__name__ else ids.flip(1)
    causal = "Causal" in type(model).__name__
    made = [{"input_ids": i, "labels": i if causal else y} for i, y in zip(ids, labels, strict=True)]
    if model.config.is_encoder_decoder:  # as transformers' collator for such models prepares it
        made = [d | {"decoder_input_ids": torch.cat((torch.zeros(1, dtype=torch.long), d["labels"][:-1]))} for d in made]
    return made


def trained(make, gated):
    """Parameters after four steps of the Trainer, with its own loss or the callback's."""
    torch.manual_seed(0)
    model = make()
    callback = trainer_callback({"backward": {"unit": "sequence", "keep_fraction": 1.0}}) if gated else None
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        max_steps=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        seed=1,
    )
    given = {"callbacks": [callback], "compute_loss_func": callback.loss} if gated else {}
    transformers.Trainer(model, args, train_dataset=data(model), **given).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("make", [t5, bert, classifier, mixtral])
def test_a_gate_that_keeps_everything_trains_as_the_trainer_alone(make):
    plain, gated = trained(make, False), trained(make, True)
    start = torch.cat([p.detach().flatten() for p in (torch.manual_seed(0), make())[1].parameters()])
    assert (plain - start).abs().max() > 1e-3
    torch.testing.assert_close(gated, plain, rtol=1e-5, atol=1e-6)
