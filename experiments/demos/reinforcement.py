"""Reinforcement from a tuned model, with and without a gate, beside more tuning: `spikegate demo reinforcement`.

A small model is tuned to close brackets until it solves a part of the held-out questions. From there three runs go on for
the same reference seconds, generation included: more tuning, reinforcement, and reinforcement whose gate looks at a
prompt before anything is sampled. The page shows the share of questions solved over reference seconds, as it came out:
one seed each, which is a demonstration and no verdict.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runs.folder import read_json
from experiments.runs.hydra_app import setting
from experiments.runs.plain_json import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START_S, BUDGET_S = 4.0, 10.0
"""Reference seconds of the tuning that all begin with, and of each run from there."""
START = ("objective=instruct", "optim.lr=3e-3")
ARMS: Mapping[str, Sequence[str]] = {
    "more tuning": ("objective=instruct",),
    "reinforcement": ("objective=rl",),
    "reinforcement, gated": ("objective=rl_surprise", "trainer.batch_windows=64"),
}
"""What each run is called, and its words; all else is experiment=reinforce."""
COLOURS = {"more tuning": "#7a7a7a", "reinforcement": "#d55e00", "reinforcement, gated": "#0072b2"}
Call = Callable[[Sequence[str]], None]


def demo(folder: Path, call: Call, budget_s: float = BUDGET_S, seed: int = 0) -> dict[str, Any]:
    """Train what is not there yet, each run by `call` (the words of a command), and write `reinforcement.html` and `.json`.

    Raises KeyboardInterrupt where a run was interrupted; whatever `call` raises.
    """
    start = folder / "start"
    _run(start, [*START, f"trainer.budget_reference_s={START_S:g}", f"seed={seed}"], call)
    for name, words in ARMS.items():
        _say(name)
        budget = f"trainer.budget_reference_s={budget_s:g}"
        _run(_folder(folder, name), [*words, setting("init", start), budget, f"seed={seed}"], call)
    found = document(folder)
    write_json(folder / "reinforcement.json", found)
    write_text(folder / "reinforcement.html", page(found))
    return found


def _folder(folder: Path, name: str) -> Path:
    return folder / name.replace(", ", "-").replace(" ", "-")


def _run(run: Path, words: Sequence[str], call: Call) -> None:
    if _finished(run):
        return
    call(["experiments.train", "experiment=reinforce", *words, setting("run", run)])
    if not _finished(run):
        raise KeyboardInterrupt


def _finished(run: Path) -> bool:
    note = run / "run.json"
    return note.exists() and read_json(note).get("status") == "finished"


def document(folder: Path) -> dict[str, Any]:
    """What came out: share of questions solved over reference seconds, by run."""
    start = read_json(folder / "start" / "result.json")
    solved = start["task"]["task/accuracy"]
    arms: dict[str, Any] = {}
    for name in ARMS:
        run = _folder(folder, name)
        result = read_json(run / "result.json")
        last: dict[int, tuple[float, float]] = {}
        for line in _metrics(run / "metrics.jsonl"):
            if line.get("task/accuracy") is not None:
                last[int(line["step"])] = (float(line["reference_s"]), float(line["task/accuracy"]))
        arms[name] = {
            "solved": result["task"]["task/accuracy"],
            "reference_s": result["reference_s"],
            "sampling_s": result["gate_reference_s"],
            "steps": result["steps"],
            "empty_steps": result["empty_steps"],
            "curve": [[0.0, solved], *map(list, last.values())],
        }
    return {"start": {"solved": solved, "reference_s": start["reference_s"]}, "arms": arms, "seed": start["seed"]}


def _metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def figure(found: Mapping[str, Any]) -> Figure:
    """Share of questions solved over reference seconds."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = drawn.subplots()
    for name, arm in found["arms"].items():
        seconds, solved = zip(*arm["curve"], strict=True)
        axes.plot(seconds, [100 * share for share in solved], marker="o", markersize=3, color=COLOURS[name], label=name)
    axes.set_xlabel("reference seconds after the tuning, generation included")
    axes.set_ylabel("held-out questions solved, %")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn


def page(found: Mapping[str, Any]) -> str:
    """The page: what was done, the picture, the numbers."""
    from experiments.views.blocks import Block
    from experiments.views.page import picture, shell, table

    rows = [
        [name, f"{arm['solved']:.1%}", f"{arm['reference_s']:.1f}", f"{arm['sampling_s']:.1f}", str(arm["steps"])]
        for name, arm in found["arms"].items()
    ]
    start = found["start"]
    block = Block(
        "After the same reference seconds",
        ["run", "solved", "reference s", "of it sampling and scoring", "updates"],
        rows,
        [f"One seed ({found['seed']}): a demonstration and no verdict. The model that all began with solved "
         f"{start['solved']:.1%} after {start['reference_s']:.1f} reference seconds of tuning."],
    )  # fmt: skip
    caption = "Share of the held-out questions that greedy decoding solves, over counted work"
    said = (
        "A question shows open brackets, an answer closes them, and several answers are right. Tuning learns one reference "
        "answer; reinforcement samples eight answers a prompt and learns what the verifier finds right. The gate "
        "samples only "
        "from the quarter of the prompts whose outcome is most open."
    )
    parts = ["<h1>Reinforcement from a tuned model</h1>", f"<p>{html.escape(said)}</p>", picture(figure(found), caption, 0)]
    return shell("Reinforcement", [*parts, table(block)])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
