"""`spikegate study NAME [...]`: experiments of their own; each prints a table, and one JSON document as its last line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.runs.hand_on import hand_on
from experiments.runs.output import entry

STUDIES = {
    "activity": "fewer synaptic operations of a trained model against its loss, with controls",
    "spiking_lm": "a language model wholly on the chip beside a Transformer",
    "digits": "a spiking classifier, trained on snnTorch, converted, run on three simulators",
    "inference": "can a small model that answers often replace a larger one? accuracy against counted inference FLOPs",
    "pictures": "a residual network for pictures by each route, beside dense matrices in place of its convolutions",
    "learned_objective": "likelihood of one reference, a verifier's reward and a learned one at equal reference seconds",
    "overoptimisation": "a learned, flawed reward is followed: true reward and proxy, published form, flag, remedies",
    "dropped": "what a gate leaves out of text that nobody prepared, by kind, with samples",
    "transfer": "what more instruction tasks teach about tasks never trained on",
    "rates": "whether the best learning rate stays put over width and depth",
    "reinforcement": "reinforcement from a tuned model, with and without a gate before generation, beside its controls",
    "sanafe_check": "counts, energy and time beside SANA-FE's (make energy-check)",
}
"""Name -> what it asks; each lives in `experiments.studies.NAME`, with `main(argv) -> exit code`."""


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Run one study and return its exit code; 2 for an unknown name."""
    return hand_on("study", "experiments.studies", STUDIES, list(argv or ()))


if __name__ == "__main__":
    sys.exit(main())
