"""Text to batches: corpora, tokenizers, exact resumable streams, the regimes and their controls."""
