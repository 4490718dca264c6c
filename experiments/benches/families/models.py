"""One small model of each family, random weights, and inputs for it.

Weights, biases and gains are stirred, so that a lost one shows. Models of Hugging Face need the package transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS, INNER = 60, 16, 32, 4, 2, 64
CALIBRATION, HELD_OUT = 8, 4  # samples
SPIKING_STEPS = 8
TEXT, PATCHES, PICTURE, VECTOR, STEP = "token", "patch", "picture", "vector", "step"

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model in eval mode, inputs to set its ranges on, others to judge by, and what one row of a sample is."""

    model: nn.Module
    calibration: Inputs
    held_out: Inputs
    unit: str
    route: str = "graded"


def _hugging_face(model: str, config: str, keys: dict[str, Any], **more: Any) -> Family:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**keys))
    return Family(stirred(made), {**tokens(0, CALIBRATION), **more}, {**tokens(1, HELD_OUT), **more}, TEXT)


def tokens(seed: int, samples: int) -> Inputs:
    """Token numbers int64 (samples, CONTEXT)."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, VOCABULARY, (samples, CONTEXT), generator=generator)}


def stirred(model: nn.Module) -> nn.Module:
    """The model in eval mode with noise of 0.05 on every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def gpt2() -> Family:
    """GPT-2: Conv1D layers, GELU."""
    keys = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return _hugging_face("GPT2LMHeadModel", "GPT2Config", keys | {"bos_token_id": 0, "eos_token_id": 0}, use_cache=False)


def _causal(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def llama() -> Family:
    """Llama: RMSNorm, gated SiLU, rotary positions, grouped queries."""
    return _hugging_face("LlamaForCausalLM", "LlamaConfig", _causal(), use_cache=False)


def qwen3() -> Family:
    """Qwen3: a norm on queries and keys."""
    return _hugging_face("Qwen3ForCausalLM", "Qwen3Config", _causal(), use_cache=False)


def gemma() -> Family:
    """Gemma: gated GELU, a scaled embedding."""
    return _hugging_face("GemmaForCausalLM", "GemmaConfig", _causal(), use_cache=False)


def mixtral() -> Family:
    """Mixtral: two of four experts for each token."""
    keys = _causal(num_local_experts=4, num_experts_per_tok=2)
    return _hugging_face("MixtralForCausalLM", "MixtralConfig", keys, use_cache=False)


def bert() -> Family:
    """BERT: an encoder with a pooler."""
    keys = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
    }
    return _hugging_face("BertModel", "BertConfig", keys)


def vit() -> Family:
    """ViT: patches of a picture through a convolution, then an encoder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=4,
    )
    x = [torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (CALIBRATION, HELD_OUT)]
    model = stirred(transformers.ViTModel(config))
    return Family(model, {"pixel_values": x[0]}, {"pixel_values": x[1]}, PATCHES)


def t5() -> Family:
    """T5: an encoder and a decoder, ReLU inside."""
    keys = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 0,
    }
    found = _hugging_face("T5ForConditionalGeneration", "T5Config", keys, use_cache=False)
    for inputs in (found.calibration, found.held_out):
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    return found


def mamba() -> Family:
    """Mamba: a state space model."""
    keys = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "state_size": 8,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _hugging_face("MambaForCausalLM", "MambaConfig", keys, use_cache=False)


def mlp_chain() -> Family:
    """Five linear layers with ReLU between them."""
    torch.manual_seed(0)
    widths = (64, 128, 64, 64, 32, 10)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return _of(nn.Sequential(*layers[:-1]), (64,), VECTOR)


class Residual(nn.Module):
    """Two convolutions beside the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + x)


def digits_cnn() -> Family:
    """Two convolutions, average pooling, two linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return _of(model, (1, 8, 8), PICTURE)


def residual_cnn() -> Family:
    """A convolution with batch norm, a residual block, global pooling, a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    return _of(model, (1, 8, 8), PICTURE)


def _of(model: nn.Module, shape: tuple[int, ...], unit: str) -> Family:
    x = [torch.rand(n, *shape, generator=torch.Generator().manual_seed(n)) for n in (CALIBRATION, HELD_OUT)]
    return Family(stirred(model), {"input": x[0]}, {"input": x[1]}, unit)


def _spiking(neuron: str, *, readout: str = "", **keys: Any) -> Family:
    """Two linear layers into neurons of snnTorch's default settings; inputs are spikes (samples, STEPS, 20)."""
    import snntorch

    torch.manual_seed(0)

    def neurons(size: int, **more: Any) -> nn.Module:
        loop = {"linear_features": size} if neuron.startswith("R") else {}
        made: nn.Module = getattr(snntorch, neuron)(init_hidden=True, **keys, **loop, **more)
        snntorch.SpikingNeuron.instances.remove(made)  # a list of the class, which would keep it for ever
        return made

    last = {"reset_mechanism": readout} if readout else {}
    layers = nn.Linear(20, 32), nn.Linear(32, 10)
    model = nn.Sequential(layers[0], neurons(32), layers[1], neurons(10, **last)).eval()
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(4)  # so that neurons spike
    x = [
        (torch.rand(n, SPIKING_STEPS, 20, generator=torch.Generator().manual_seed(n)) < 0.3).float()
        for n in (CALIBRATION, HELD_OUT)
    ]
    return Family(model, {"input": x[0]}, {"input": x[1]}, STEP, "lif")


def leaky() -> Family:
    """snnTorch's Leaky as it comes: reset by subtraction."""
    return _spiking("Leaky", beta=0.9)


def synaptic() -> Family:
    """snnTorch's Synaptic, a current that decays."""
    return _spiking("Synaptic", alpha=0.7, beta=0.9)


def recurrent_leaky() -> Family:
    """snnTorch's RLeaky, all neurons of a layer connected."""
    return _spiking("RLeaky", beta=0.8)


FAMILIES: dict[str, Callable[[], Family]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Qwen3": qwen3,
    "Gemma": gemma,
    "Mixtral": mixtral,
    "BERT": bert,
    "ViT": vit,
    "T5": t5,
    "Mamba": mamba,
    "MLP chain": mlp_chain,
    "digits CNN": digits_cnn,
    "residual CNN": residual_cnn,
    "snnTorch Leaky": leaky,
    "snnTorch Synaptic": synaptic,
    "snnTorch RLeaky": recurrent_leaky,
}
"""Name in the table -> what makes the model."""
