"""`python -m experiments.bench WHAT [...]`: measurements; each prints a table, and one JSON document as its last line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.runs.hand_on import hand_on
from experiments.runs.output import entry

BENCHES = {
    "gate": "step times and FLOPs of every kind of sparse step against the fastest dense step",
    "attach": "time and memory of a gate on a model of one's own, ours and Hugging Face's, against the plain model",
    "clean": "clean text: time to the dense end loss, and nats against the best dense model of any size at that time",
    "generation": "tokens per second of our sampler beside Hugging Face's generate on the same weights",
    "reinforcement": "a GRPO step of ours beside one of TRL's GRPOTrainer from the same weights (make trl)",
    "simulator": "spikes per second of the fixed-point simulator",
    "conversion": "loss, operations and speed of a trained model on the simulated chip; with --families a table of them",
    "clock": "CPU seconds of every kind of step and of scoring, for a shipped table of component times",
    "clock_fit": "the shipped table out of what `clock` measured, and how well it predicts",
    "any_module": "steps of small networks of several kinds, for the shipped prices of a model of one's own",
    "gpu": "every figure that needs a GPU, in one command of at most eight minutes",
    "scale": "many processes measured here, published throughput tables reproduced, up to 10,000 GPUs planned by counting",
    "account": "modelled joules and time of published networks against what was measured",
}
"""Name -> what it measures; each lives in `experiments.benches.NAME`, with `main(arguments) -> exit code`."""

MODULES = {"generation": "generating", "reinforcement": "reinforcing", "scale": "scaling"}
"""Name -> module, where they differ."""


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Run one bench and return its exit code; 2 for an unknown name."""
    return hand_on("bench", "experiments.benches", BENCHES, list(argv or ()), MODULES)


if __name__ == "__main__":
    sys.exit(main())
