"""Run folders made by hand, as training and deployment leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.experiments.comparison.records import arm_record, deployed_record

RunMaker = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    def make(arm: str, loss: float | str, *, seed: int = 0, stream: str = "clean", name: str = "", **info: Any) -> Path:
        changes, settings = info.pop("result", {}), info.pop("settings", None)
        folder = tmp_path / (name or f"{stream}-{arm}-{seed}")
        folder.mkdir()
        record = {"schema": 1, "kind": "train", "status": "finished", "stream": stream, "arm": arm, "seed": seed}
        record |= {"component_times_sha256": "a" * 64, "started": f"2026-01-0{seed + 1}T00:00:00"} | info
        (folder / "run.json").write_text(json.dumps(record))
        if settings is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        number = loss if isinstance(loss, float) else 0.0
        (folder / "result.json").write_text(json.dumps(arm_record(number, **changes) | {"loss_nats": loss}))
        curve = [{"step": i, "reference_s": 2.0 * i, "val_loss_nats": number + 3.0 / (1 + i)} for i in range(11)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve) + '{"step": 11, "re')
        return folder

    return make


@pytest.fixture
def make_deployment(tmp_path: Path) -> RunMaker:
    def make(*, stream: str = "clean", name: str = "deploy", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        record = deployed_record(**changes)
        info = {"schema": 1, "kind": "deploy", "status": "finished", "stream": stream, "arm": record["arm"], "seed": 0}
        (folder / "run.json").write_text(json.dumps(info))
        (folder / "deploy.json").write_text(json.dumps(record))
        return folder

    return make


@pytest.fixture
def make_ladder(make_run: RunMaker) -> Callable[..., None]:
    def make(arm: str, ends: dict[float, list[float]], stream: str = "noisy", **result: Any) -> None:
        """One run per budget and seed, its end loss given; `known`: per budget the losses on other held-out text."""
        known = result.pop("known", {})
        for budget, losses in ends.items():
            for seed, loss in enumerate(losses):
                numbers = {"budget_reference_s": budget, "reference_s": 0.999 * budget, **result}
                if budget in known:
                    numbers["held_out"] = {"val": {"loss_nats": loss}, "known": {"loss_nats": known[budget][seed]}}
                make_run(arm, loss, seed=seed, stream=stream, name=f"{stream}-{arm}-{budget}-{seed}", result=numbers)

    return make
