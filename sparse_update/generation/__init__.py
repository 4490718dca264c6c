"""Sampling from the Transformer: many outputs a prompt, exact log-probabilities, the same tokens in any batch.

`neuro.generate` continues one text with any module, deployed ones too, and knows neither rows that stop nor
log-probabilities; this room samples batches from our Transformer, fast.
"""

from sparse_update.generation.sampler import Sampler
from sparse_update.generation.settings import GenerateConfig, GenerationError, Outputs
from sparse_update.generation.text import Texts, generate, stop_tokens

__all__ = ["GenerateConfig", "GenerationError", "Outputs", "Sampler", "Texts", "generate", "stop_tokens"]
