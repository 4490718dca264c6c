"""Architectures of transformers, from tiny configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.sparse_update.library.zoo.entry import Entry, V, logits_of, noise, none_of_them, tokens

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": V, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
BERT = {**SMALL, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {**SMALL, **EXPERTS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
DEEPSEEK |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": V, "dropout_rate": 0}
VIT = {**BERT, "image_size": 16, "patch_size": 4, "num_labels": 5}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": V, "pad_token_id": 0}
RWKV = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": V}
WAV2VEC2 = {**SMALL, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (4, 3), "num_feat_extract_layers": 2}
WAV2VEC2 |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0, "layerdrop": 0}
WAV2VEC2 |= {"attention_dropout": 0, "feat_proj_dropout": 0, "activation_dropout": 0, "final_dropout": 0}
WAV2VEC2 |= {"apply_spec_augment": False, "mask_time_prob": 0.0}


def _made(model: str, config: str, attention: str, **values: Any) -> nn.Module:
    import transformers

    cfg = getattr(transformers, config)(**values)
    cfg._attn_implementation = attention
    cfg._experts_implementation = "eager"  # the grouped kernel has no float64
    made: nn.Module = getattr(transformers, model)(cfg)
    return made


def _llava(attention: str) -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    values = {"vision_config": vision, "text_config": text, "image_token_index": V - 1, "image_token_id": V - 1}
    return _made("LlavaForConditionalGeneration", "LlavaConfig", attention, **values)


def _qwen2_vl(attention: str) -> nn.Module:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**SMALL, "num_key_value_heads": 1, "rope_parameters": rotary}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    return _made("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", attention, text_config=text, vision_config=vision)


def _causal(model: nn.Module, batch: int, length: int) -> Tensor:
    return logits_of(model(tokens(batch, length), use_cache=False))


def _masked(model: nn.Module, batch: int, length: int) -> Tensor:
    return logits_of(model(tokens(batch, length)))


def _t5(model: nn.Module, batch: int, length: int) -> Tensor:
    return logits_of(model(input_ids=tokens(batch, length, 7), decoder_input_ids=tokens(batch, length), use_cache=False))


def _see(model: nn.Module, batch: int, length: int) -> Tensor:
    x = tokens(batch, length)
    x[:, 1:5] = V - 1
    return logits_of(model(input_ids=x, pixel_values=noise(batch, 3, 16, 16).to(_kind(model)), use_cache=False))


def _kind(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters())


def _image(model: nn.Module, batch: int, length: int) -> Tensor:
    return logits_of(model(pixel_values=noise(batch, 3, 16, 16).to(_kind(model))))


def _sound(model: nn.Module, batch: int, length: int) -> Tensor:
    return logits_of(model(noise(batch, 4 * length + 5).to(_kind(model))))


def _with_mask(model: nn.Module, batch: int, length: int, mask: Tensor) -> Tensor:
    return logits_of(model(tokens(batch, length), attention_mask=mask.long()))


def _lm(title: str, model: str, config: str, values: dict[str, Any], **more: Any) -> Entry:
    return Entry(title, lambda a: _made(model, config, a, **values), more.pop("call", _causal), padded=_with_mask, **more)


ENCODER = ("encoder.*", "decoder.*EncDecAttention.k", "decoder.*EncDecAttention.v")
PATCHES = ("model.vision_tower.encoder.layers.0.*", "model.multi_modal_projector.*")

HF: dict[str, Entry] = {
    "gpt2": _lm("GPT-2", "GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": _lm("Llama", "LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}),
    "qwen3": _lm("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", SMALL | GROUPED),
    "gemma2": _lm(
        "Gemma 2 (capped logits, sliding window)",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**SMALL, **GROUPED, "sliding_window": 4},
        attentions=("eager",),
    ),
    "mixtral": _lm("Mixtral", "MixtralForCausalLM", "MixtralConfig", {**SMALL, **GROUPED, "num_local_experts": 4}),
    "qwen3_moe": _lm(
        "Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**SMALL, **GROUPED, **EXPERTS, "num_experts": 4}
    ),
    "deepseek_v3": _lm(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**DEEPSEEK, "num_key_value_heads": 2, "first_k_dense_replace": 1},
    ),
    "qwen2_vl": Entry("Qwen2-VL on text (positions of three dimensions)", _qwen2_vl, _causal),
    "bert": _lm("BERT, masked tokens", "BertForMaskedLM", "BertConfig", BERT, call=_masked),
    "albert": _lm(
        "ALBERT, shared layers", "AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 8}, call=_masked
    ),
    "t5": Entry(
        "T5",
        lambda a: _made(
            "T5ForConditionalGeneration", "T5Config", a, **T5, decoder_start_token_id=0, tie_word_embeddings=False
        ),
        _t5,
        dense={"token": ENCODER},
    ),
    "vit": Entry(
        "ViT, classes of images", lambda a: _made("ViTForImageClassification", "ViTConfig", a, **VIT), _image, ("sequence",)
    ),
    "mamba": _lm("Mamba", "MambaForCausalLM", "MambaConfig", MAMBA, attentions=("eager",), single=True),
    "mamba2": _lm(
        "Mamba-2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**MAMBA, "num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 4},
        attentions=("eager",),
        single=True,
    ),
    "rwkv": Entry(
        "RWKV-4",
        lambda a: _made("RwkvForCausalLM", "RwkvConfig", a, **RWKV, context_length=64),
        _causal,
        attentions=("eager",),
    ),
    "wav2vec2": Entry(
        "wav2vec 2.0, classes of frames", lambda a: _made("Wav2Vec2ForCTC", "Wav2Vec2Config", a, **WAV2VEC2), _sound
    ),
    "llava": Entry(
        "LLaVA",
        _llava,
        _see,
        dense=dict.fromkeys(("token", "sequence"), PATCHES),
        rows={"model.vision_tower.*": none_of_them},
    ),
}
