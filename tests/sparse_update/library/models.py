"""Models to attach the gate to, and what is done to them by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update.transformer import ModelConfig, Transformer

B, T, V = 4, 12, 41
CHOICES = [("blocks", "rotate", 1), ("block_columns", "rotate", 1), ("blocks", "random", 2), ("blocks", "energy", 1)]


class Encoder(nn.Module):
    """torch's own Transformer, both layouts."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(V, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, V)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.head.weight.dtype)
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.body(h, mask=mask, is_causal=True)
        return self.head(h if self.batch_first else h.transpose(0, 1))


def ours(tie=False):
    model = Transformer(
        ModelConfig(width=16, layers=2, heads=2, context=T, vocab_size=V, attention="explicit", tie_embeddings=tie)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def gpt2(attention="eager"):
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    cfg = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=V, n_positions=T, bos_token_id=0, eos_token_id=0
    )
    cfg.attn_pdrop = cfg.embd_pdrop = cfg.resid_pdrop = 0.0
    cfg._attn_implementation = attention
    return transformers.GPT2LMHeadModel(cfg)


def llama():
    transformers = pytest.importorskip("transformers", reason="needs the extra hub (transformers)")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=V,
            max_position_embeddings=T,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


MODELS = {
    "ours": ours,
    "tied": lambda: ours(tie=True),
    "gpt2": gpt2,
    "llama": llama,
    "encoder": Encoder,
    "encoder_TB": lambda: Encoder(False),
}


def data():
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def logits_of(model, x):
    out = model(x)
    return getattr(out, "logits", out)


def token_losses(model, x, y):
    return F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected, **how):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **how)


def cut(model, keep_BT):
    """Hooks on a plain model: the output of every product and embedding is a constant at rows that are not kept."""

    def hook(module, args, out):
        lead = out.shape[:-1]
        if lead[:2] == (B, T):
            keep = keep_BT
        elif lead[:2] == (T, B):
            keep = keep_BT.t()
        elif lead == (B * T,):
            keep = keep_BT.flatten()
        else:
            return out
        return torch.where(keep[..., None], out, out.detach())

    kinds = ("Linear", "Embedding", "Conv1D")
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.register_forward_hook(hook)


def top_rows(loss_BT, kept):
    keep = torch.zeros(loss_BT.shape, dtype=torch.bool)
    return keep.scatter_(1, loss_BT.detach().topk(kept, dim=1).indices, True)


def loader(n=64, size=8):
    generator = torch.Generator().manual_seed(0)
    known = torch.arange(T + 1).repeat(n // 2, 1) % V
    noise = torch.randint(0, V, (n - n // 2, T + 1), generator=generator)
    rows = torch.stack([known, noise], 1).flatten(0, 1)
    for start in range(0, n, size):
        part = rows[start : start + size]
        yield {"input_ids": part, "number": torch.arange(start, start + len(part))}
