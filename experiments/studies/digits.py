"""`python -m experiments.studies.digits`: a spiking classifier of digits, trained with snnTorch, on three simulators.

scikit-learn's digits (1,797 images of 8 x 8, ten classes; in its wheel, nothing is downloaded) are split by class and at
random with a fixed seed, 450 of them held out. The trained float network becomes an integer graph, which runs on our
simulator in both modes and on snnTorch, and a few samples of it in Lava, where every state of every step is compared.

The last line is JSON. Exit codes: 0 the accuracies hold (float at least 0.95, integers within a point of it, Lava equal
where it ran); 1 they do not, or Lava failed; 2 the command is wrong or a package is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.runs.output import add_json_argument, entry, finish
from neuro.conversion.lif import LifNetwork, convert_lif
from neuro.graph import save_graph
from neuro.modules.spiking import SpikingClassifier, count_loss, current_code, predicted, rate_code
from neuro.simulators import snntorch_backend
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava import client as lava_client

HELD_OUT = 450
LEVELS = 16  # grey values of the images
BAR = 0.95
WITHIN = 0.01
Code = Callable[[Tensor], Tensor]


def load(held_out: int = HELD_OUT, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as float32 (B, 64) in 0..1 and classes int64 (B,): training, then held out; split by class at random.

    Raises ModuleNotFoundError without scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(range(len(digits.target)), test_size=held_out, stratify=digits.target, random_state=seed)
    images = torch.from_numpy(digits.data).float() / LEVELS
    classes = torch.from_numpy(digits.target).long()
    return images[train], classes[train], images[test], classes[test]


def train(
    images_BF: Tensor, classes_B: Tensor, code: Code, *, hidden: int, epochs: int, seed: int, batch: int = 64
) -> SpikingClassifier:
    """Train a classifier of one hidden layer on coded images: Adam, one cycle up to 6e-3."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SpikingClassifier((images_BF.shape[1], hidden, int(classes_B.max()) + 1), beta=0.9)
    optimizer = torch.optim.Adam(model.parameters())
    total = epochs * -(-len(images_BF) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=total)
    for _ in range(epochs):
        for rows in torch.randperm(len(images_BF), generator=generator).split(batch):
            loss = count_loss(model(code(images_BF[rows])), classes_B[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def integers(model: SpikingClassifier, code: str, steps: int) -> LifNetwork:
    """The integer network of a classifier trained on that code."""
    layers = [(layer.linear, layer.neuron) for layer in model.layers]
    if code == "current":
        return convert_lif(layers, steps=steps, input_scale=1 / LEVELS, input_range=(0, LEVELS))  # type: ignore[arg-type]
    return convert_lif(layers, steps=steps)  # type: ignore[arg-type]


def evaluate(network: LifNetwork, x_BTF: Tensor, classes_B: Tensor) -> dict[str, Any]:
    """Accuracies of an integer network on our simulator, both modes, strict, and on snnTorch; and its traffic."""
    (output,) = network.graph.outputs
    inputs = network.present(x_BTF)
    found: dict[str, Any] = {}
    for mode in ("lava", "chip"):
        activity = simulate(network.graph, inputs, mode=mode, strict=True)
        found[mode] = _accuracy(network.collect(activity.spikes[output]), classes_B)
        synops = sum(counts.synops for counts in activity.projections.values())
        found["synops_per_image"] = synops / len(classes_B)
    activity = snntorch_backend.run(network.graph, inputs)
    found["snntorch"] = _accuracy(network.collect(activity.spikes[output]), classes_B)
    return found


def against_lava(network: LifNetwork, x_BTF: Tensor, timeout_s: float) -> dict[str, Any]:
    """The samples one behind the other in one Lava network, compared with ours: messages, u, v and sums of all steps."""
    inputs = network.stream(x_BTF)
    record = ("spikes", "u", "v", "a_in")
    result = compare(
        lava_client.run(network.graph, inputs, record=record, timeout_s=timeout_s),
        simulate(network.graph, inputs, record=record),
    )
    return {"samples": len(x_BTF), "equal": result.equal, "values": result.values, "text": str(result)}


def _accuracy(spikes_BTC: Tensor, classes_B: Tensor) -> float:
    return float((predicted(spikes_BTC) == classes_B).double().mean())


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="spikegate study digits", description="a spiking classifier")
    parser.add_argument("--code", choices=("current", "rate"), default="current", help="input code (default: current)")
    parser.add_argument("--steps", type=int, default=16, help="steps per image (default: 16)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden neurons (default: 128)")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and split (default: 0)")
    parser.add_argument(
        "--lava-samples", type=int, default=16, help="held-out images that run in Lava, 0: none (default: 16)"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that Lava may take (default: 120)")
    parser.add_argument("--graph", type=Path, default=None, help="write the integer network there (NAME.graph.npz)")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    for key, low in (("steps", 1), ("hidden", 1), ("epochs", 1), ("lava_samples", 0)):
        if getattr(args, key) < low:
            parser.error(f"--{key.replace('_', '-')} is {getattr(args, key)}; the lowest is {low}")
    try:
        return _run(args)
    except (ModuleNotFoundError, snntorch_backend.SnnTorchUnavailable) as error:
        print(f"digits: {error}; pip install 'spikegate[spiking]'", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    images, classes, test_images, test_classes = load(seed=args.seed)

    def code(values_BF: Tensor) -> Tensor:
        return current_code(values_BF, args.steps) if args.code == "current" else rate_code(values_BF, args.steps)

    start = time.perf_counter()
    model = train(images, classes, code, hidden=args.hidden, epochs=args.epochs, seed=args.seed)
    seconds = time.perf_counter() - start
    test_x = code(test_images)
    with torch.no_grad():
        accuracy = _accuracy(model(test_x), test_classes)
    network = integers(model, args.code, args.steps)
    if args.graph is not None:
        save_graph(network.graph, args.graph)
    found = evaluate(network, test_x, test_classes)
    print(f"{len(classes)} images to train on, {len(test_classes)} held out, {args.code} code, {args.steps} steps")
    print(network.table())
    print(
        f"accuracy: float {accuracy:.4f}; integers: mode lava {found['lava']:.4f}, mode chip {found['chip']:.4f};", end=" "
    )
    print(f"snnTorch {found['snntorch']:.4f}")
    holds = accuracy >= BAR and all(abs(found[key] - accuracy) <= WITHIN + 1e-9 for key in ("lava", "chip", "snntorch"))
    lava: dict[str, Any] = {"ran": False, "reason": "not asked for"}
    if args.lava_samples:
        try:
            lava = {"ran": True, **against_lava(network, test_x[: args.lava_samples], args.timeout)}
            holds = holds and lava["equal"]
            print(f"Lava, {lava['samples']} images: {lava['text']}")
        except lava_client.LavaUnavailable as error:
            lava = {"ran": False, "reason": str(error)}
            print(f"Lava did not run: {error}")
        except lava_client.LavaError as error:
            lava, holds = {"ran": False, "reason": str(error)}, False
            print(f"digits: {error}", file=sys.stderr)
    document = {
        "holds": holds,
        "accuracy": {"float": accuracy, **{key: found[key] for key in ("lava", "chip", "snntorch")}},
        "synops_per_image": found["synops_per_image"],
        "lava": lava,
        "held_out": len(test_classes),
        "code": args.code,
        "steps": args.steps,
        "seed": args.seed,
        "train_s": seconds,
    }
    finish(document, "digits")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
