"""Our Transformer's weights in a Hugging Face class, and what its `generate` is asked for.

The class is Arcee's: a Llama with an MLP of two matrices and a squared ReLU, which is our block to the operation. A Llama
proper has a gated MLP, which gives the same numbers with our first matrix twice (relu(x) x = relu(x)^2) and does half more
products in the MLP; it is there for tools that know no other class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_update.transformer import Transformer

NAMES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
PEERS = ("arcee", "llama")


def exported(model: Transformer, peer: str = "arcee", attention: str = "sdpa") -> nn.Module:
    """The same function in a class of transformers, in eval mode.

    Args:
        peer: "arcee" or "llama"; the latter takes a model with squared ReLU only.
        attention: of transformers' implementations.

    Raises ValueError for another peer, and for a ReLU in a Llama; ModuleNotFoundError without transformers.
    """
    import transformers

    if peer not in PEERS:
        raise ValueError(f"peer {peer!r}: one of {', '.join(PEERS)}")
    cfg = model.cfg
    if peer == "llama" and cfg.activation != "relu2":
        raise ValueError(
            f"model.activation = {cfg.activation}: a Llama's gated MLP is ours with relu2 only; take peer arcee"
        )
    kind = "Arcee" if peer == "arcee" else "Llama"
    act = "relu" if peer == "llama" else cfg.activation
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        intermediate_size=cfg.hidden_ratio * cfg.width,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        hidden_act=act,
        max_position_embeddings=cfg.context,
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        found = getattr(transformers, f"{kind}ForCausalLM")(config)
    missing, unexpected = found.load_state_dict(renamed(model, peer), strict=False)
    left = [name for name in missing if not (cfg.tie_embeddings and name == "lm_head.weight")]
    if left or unexpected:
        raise ValueError(f"{kind}ForCausalLM has other weights than expected: {[*left, *unexpected]}")
    return found.to(model.embed.weight.device, model.embed.weight.dtype).eval()


def renamed(model: Transformer, peer: str) -> dict[str, Tensor]:
    """The model's weights by the class's names."""
    names = {**NAMES, "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    found = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for name, value in model.state_dict().items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            ours = rest.removesuffix(".weight")
            found[f"model.layers.{layer}.{names[ours]}.weight"] = value
            if peer == "llama" and ours == "mlp.fc1":
                found[f"model.layers.{layer}.mlp.gate_proj.weight"] = value
    if model.cfg.tie_embeddings:
        del found["lm_head.weight"]
    return {name: value.detach().clone() for name, value in found.items()}


def padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts with their ends in one column, as `generate` takes them: tokens and attention mask, (B, T) int64."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt))
        mask[row, longest - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


@torch.no_grad()
def theirs(
    peer: Any, prompts: Sequence[np.ndarray], n: int, new_tokens: int, temperature: float, stop: Sequence[int]
) -> list[np.ndarray]:
    """Tokens of every output, (prompts x n), by transformers' `generate`; the stop token included."""
    tokens, mask = padded(prompts, next(peer.parameters()).device)
    asked: dict[str, Any] = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    if temperature:
        asked |= {"top_k": 0, "num_return_sequences": n}
    found = peer.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=list(stop) or None,
        **asked,
    )
    rows = []
    for row in found[:, tokens.shape[1] :].cpu().numpy():
        ends = np.flatnonzero(np.isin(row, list(stop)))
        rows.append(row[: ends[0] + 1] if len(ends) else row)
    return rows
