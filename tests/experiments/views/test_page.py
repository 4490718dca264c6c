"""The HTML page: nothing from outside, numbers of comparison.json, and what was left out."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from experiments.compare import write
from experiments.comparison.collection import collect
from experiments.views.tables import markdown

LAYERS = [
    {
        "layer": name,
        "weight_bytes": 4096,
        "graded": True,
        "payload_bits": 8,
        "host": host,
        "synops_per_token": 1000.0 * (i + 1),
        "events_per_token": 10.0,
        "neuron_updates_active_per_token": 20.0,
        "neuron_updates_inactive_per_token": 12.0,
        "dense_macs_per_token": 4096.0,
    }
    for i, (name, host) in enumerate([("blocks.0.attn.q", False), ("blocks.0.mlp.fc1", False), ("head", True)])
]


class Reader(HTMLParser):
    """Tables as rows of (text, data-v), attributes that name a resource, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, float | None]]]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._cell: list[str] | None = None
        self._value: float | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background")
        self.links += [str(given[name]) for name in names if name in given]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = []
            self._value = float(given["data-v"]) if given.get("data-v") is not None else None  # type: ignore[arg-type]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(("".join(self._cell), self._value))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)


def energies(tokens: int) -> list[dict[str, Any]]:
    """Priced with the profile itself, so that the record's sum is the one its counts give."""
    from experiments.comparison.accounts import _counts
    from hardware import account, load_profile

    counts = [_counts(layer, tokens) for layer in LAYERS if not layer["host"]]
    report = account(counts, load_profile("loihi1_davies2018"))
    scaled = {key: report.to_dict()[key] / tokens for key in ("low_j", "mid_j", "high_j")}
    return [report.to_dict() | scaled]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder with two arms of two seeds, a deployment with placement and time, and a run that broke off."""
    for arm, base in (("dense", 1.75), ("surprise", 1.70)):
        for seed in range(2):
            folder = tmp_path / f"{arm}-{seed}"
            folder.mkdir()
            info = {"schema": 1, "kind": "train", "status": "finished", "stream": "clean", "arm": arm, "seed": seed}
            (folder / "run.json").write_text(json.dumps(info | {"component_times_sha256": "a" * 64}))
            loss = base + seed / 300
            result = {"loss_nats": loss, "bits_per_byte": loss / math.log(2), "tokens": 1_234_567 + seed, "flops": 2.5e12}
            result |= {"reference_s": 20.0, "wall_s": 22.25, "peak_bytes": 5e8, "energy_j": None}
            result |= {"energy_reason": "not measured: no <meter> & no driver", "keep_fraction": 0.5, "val_tokens": 64}
            (folder / "result.json").write_text(json.dumps(result))
            lines = [{"step": i, "reference_s": 2.0 * i, "val_loss_nats": loss + 1 / (1 + i)} for i in range(11)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "deploy"
    folder.mkdir()
    info = {"schema": 1, "kind": "deploy", "status": "finished", "stream": "clean", "arm": "surprise", "seed": 0}
    (folder / "run.json").write_text(json.dumps(info))
    record = {"loss_float_nats": 1.70, "loss_quantised_nats": 1.71, "loss_simulated_nats": 1.72, "val_tokens": 64}
    record |= {"mapped_mac_share": 2 / 3, "events_per_token": 20.0, "synops_per_token": 3000.0, "macs_per_token": 12288.0}
    cores = [{"share": 0.25}, {"share": 0.75}]
    placement = {"chip": "loihi2", "budget": "inferred", "chips": 1, "cores_per_chip": 128, "cores": cores}
    latency = {"rates": "loihi2_estimated", "source": "a brief", "token_us": [1.0, 10.8, 45.0], "binding": "synapse"}
    latency |= {"tokens_per_s_pipelined": [1e4, 9e4, 1e6], "lower_bound": True, "labels": [], "unknown": ["memory"]}
    record |= {"layers": LAYERS, "energy": energies(64), "placement": placement, "latency": [latency]}
    (folder / "deploy.json").write_text(json.dumps(record))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text('{"schema": 1, "ki')
    write(collect([tmp_path]), tmp_path / "comparison", tensorboard=False)
    return tmp_path / "comparison"


def read(folder: Path) -> tuple[str, Reader]:
    text = (folder / "comparison.html").read_text()
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_the_page_needs_nothing_from_outside(written: Path) -> None:
    text, reader = read(written)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(link.startswith("#") for link in reader.links), reader.links
    assert all(address.startswith("#") for address in re.findall(r"url\(\s*[\"']?([^)\"']*)", text))
    assert not {"link", "img", "iframe", "object", "embed", "audio", "video", "base"} & set(reader.tags)
    assert "default-src 'none'" in text
    assert text.count("<svg") == 2  # the stream's picture, and where each joule goes
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "two pictures must not share a name"
    targets = set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
    assert targets <= set(ids)


def test_its_numbers_are_those_of_the_json(written: Path) -> None:
    _, reader = read(written)
    document = json.loads((written / "comparison.json").read_text())
    head, *rows = reader.tables[0]
    place = {name: i for i, (name, _) in enumerate(head)}
    keys = {
        "n": "n", "loss nats": "loss_nats", "vs dense": "against_dense_nats", "bits/byte": "bits_per_byte",
        "kept": "keep_fraction", "Mtokens": "tokens", "TFLOP": "flops", "reference s": "reference_s", "wall s": "wall_s",
        "peak MB": "peak_bytes", "measured energy": "energy_j", "mapped": "mapped_mac_share", "events": "events_per_token",
        "cores": "cores", "filled": "utilisation", "us/token": "token_us", "energy/token": "token_j",
    }  # fmt: skip
    assert set(place) == {"arm", *keys}
    assert [row[0][0] for row in rows] == ["dense", "surprise", "surprise, deployed"]
    for row, expected in zip(rows, document["table"], strict=True):
        for name, key in keys.items():
            assert row[place[name]][1] == expected[key], (row[0], name)
    stream = document["streams"]["clean"]
    for row, arm in zip(rows, ("dense", "surprise"), strict=False):
        assert row[place["loss nats"]][1] == stream[arm]["loss_nats"]
        assert row[place["loss nats"]][0].startswith(f"{stream[arm]['loss_nats']:.4f} [")
        assert row[place["measured energy"]][0] == "not measured"
    deployed = rows[2]
    assert deployed[place["loss nats"]][1] == 1.72
    assert deployed[place["cores"]][0] == "2 of 128"
    assert deployed[place["filled"]][1] == 0.5
    assert deployed[place["us/token"]][0] == ">= 10.8"
    assert deployed[place["energy/token"]][1] == stream["deployed"]["energy"][0]["mid_j"]
    layers = next(table for table in reader.tables if table[0][0][0] == "layer")
    (profile,) = document["joules_by_layer"][0]["profiles"]
    sums = {name: math.fsum(t[1] for t in groups.values()) for name, groups in profile["layers"].items()}
    assert {row[0][0]: row[1][1] for row in layers[1:]} == sums
    assert math.fsum(sums.values()) == pytest.approx(stream["deployed"]["energy"][0]["mid_j"])


def test_verdicts_come_first_and_what_was_left_out_is_named(written: Path) -> None:
    text, reader = read(written)
    document = json.loads((written / "comparison.json").read_text())
    said = "".join(reader.words)
    assert all(sentence in said for sentence in document["verdicts"])
    assert text.index('id="verdicts"') < text.index("<table")
    assert document["excluded"]
    assert document["excluded"][0]["folder"] in said
    assert document["excluded"][0]["reason"] in said
    assert "no <meter> & no driver" in said  # escaped, not markup
    assert "<meter>" not in text
    for source in (e["source"] for e in document["streams"]["clean"]["deployed"]["energy"]):
        assert source in said
    folders = text[text.index('id="folders"') :]
    assert all(folder in folders for arm in ("dense", "surprise") for folder in document["streams"]["clean"][arm]["runs"])
    assert document["deployments"][0]["folder"] in folders
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text


def test_pictures_lie_beside_the_page(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert {"comparison.png", "comparison.svg", "comparison.md", "comparison.json", "comparison.html"} <= names
    assert {"joules-clean-surprise-deployed.png", "joules-clean-surprise-deployed.svg"} <= names
    assert "(joules-clean-surprise-deployed.png)" in (written / "comparison.md").read_text()


def test_markdown_for_tensorboard_has_narrow_tables_with_all_cells(written: Path) -> None:
    comparison = collect([written.parent])
    whole, narrow = markdown(comparison), markdown(comparison, most_columns=6)

    def cells(text: str) -> list[list[str]]:
        return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]

    assert max(map(len, cells(whole))) > 10
    assert max(map(len, cells(narrow))) <= 6
    assert {cell for row in cells(narrow) for cell in row} == {cell for row in cells(whole) for cell in row}
    assert narrow.count("Energy: measured in 0 of 4 runs") == whole.count("Energy: measured in 0 of 4 runs") == 1
