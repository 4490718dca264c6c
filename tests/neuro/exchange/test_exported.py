"""Exported programs read as data: the same numbers and the same report as the module; nothing in a file is run."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuro
from neuro.exchange import exported
from neuro.exchange.exported import ExportedError, read_exported


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2, bias=False), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 3)
        self.shift = torch.arange(3.0)
        with torch.no_grad():
            self.bn.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.bn(self.conv(x))), 1).flatten(1)
        return torch.softmax(self.head(self.body(h)) + self.shift, -1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.shared = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = self.shared(self.shared(self.block(self.embed(tokens)))) * mask[..., None]
        first, second = h.chunk(2, dim=-1)
        return first, second.to(torch.float64).sum((0, 1))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3, padding="same")
        self.scale = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.line(x).mT, self.scale, None) @ self.scale


CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "images": (Images, (torch.rand(2, 2, 8, 8),)),
    "words": (Words, (torch.randint(11, (2, 5)), torch.ones(2, 5))),
    "branches": (Branches, (torch.rand(2, 3, 6),)),
}


def saved(folder: Path, name: str) -> tuple[nn.Module, tuple[Tensor, ...], Path]:
    torch.manual_seed(1)
    make, example = CASES[name]
    module = make().eval()
    path = folder / f"{name}.pt2"
    torch.export.save(torch.export.export(module, example), path)
    return module, example, path


@pytest.mark.parametrize("name", CASES)
def test_the_module_computes_what_the_exported_one_does(name: str, tmp_path: Path) -> None:
    module, example, path = saved(tmp_path, name)
    module = torch.export.export(module, example).module()  # torch's fused encoder, which is not exported, rounds otherwise
    again, inputs = read_exported(path)
    assert [(value.shape, value.dtype) for value in inputs] == [(value.shape, value.dtype) for value in example]
    with torch.no_grad():
        want, got = module(*example), again(*example)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f"the program takes {len(example)} inputs"):
        again(*example, example[0])


def test_its_report_is_that_of_the_module(tmp_path: Path) -> None:
    module, example, path = saved(tmp_path, "images")
    again, inputs = read_exported(path)
    want, got = neuro.analyse(module, example), neuro.analyse(again, inputs)
    assert got.mapped == want.mapped
    assert {"body.0", "body.2", "head"} <= set(got.mapped)
    assert (got.macs_per_token, got.mac_share, got.pairs) == (want.macs_per_token, want.mac_share, want.pairs)
    assert [op.kind for op in got.operations] == [op.kind for op in want.operations]
    assert sum(op.parameters for op in got.operations) == sum(op.parameters for op in want.operations)
    assert got.unused_parameters == ()


def test_a_program_is_converted_and_deployed_like_a_module(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.rand(20, 8)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "mlp.pt2")
    again, inputs = read_exported(tmp_path / "mlp.pt2")
    found = [
        neuro.deploy(each, neuro.convert(each, neuro.calibrate(each, [x]), neuro.analyse(each, inputs)))(x)
        for each in (module, again)
    ]
    assert torch.equal(*found)


class Normed(nn.Module):
    """Batch norms behind a convolution, behind linear layers, without factors, and behind a layer that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm2 = nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.fc1, self.norm1 = nn.Linear(48, 12), nn.BatchNorm1d(12, eps=1e-3)
        self.fc2, self.bare = nn.Linear(12, 12, bias=False), nn.BatchNorm1d(12, affine=False)
        self.fc3, self.shared = nn.Linear(12, 12), nn.BatchNorm1d(12)
        for norm in (self.norm2, self.norm1, self.bare, self.shared):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.fc1(torch.relu(self.norm2(self.conv(x))).flatten(1)))
        h = self.bare(self.fc2(torch.relu(h)))
        last = self.fc3(h.sigmoid())
        return self.shared(last) + last


def test_batch_norms_fold_as_those_of_a_module_in_order(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, x = Normed().eval(), torch.rand(6, 1, 4, 4)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "net.pt2")
    again, inputs = read_exported(tmp_path / "net.pt2")
    assert torch.equal(again(x), module(x))
    assert {name.split(".")[0] for name in again.state_dict()} == {name.split(".")[0] for name in module.state_dict()} - {
        "norm1",
        "bare",
    }
    assert isinstance(again.fc1, nn.Sequential)  # the form that is folded
    assert isinstance(again.fc3, nn.Linear)  # read twice, so its norm is an operation of its own
    report = neuro.analyse(again, inputs)
    norms = [op for op in report.operations if op.kind == "normalisation (fixed statistics)"]
    assert [op.runs_on for op in norms] == ["chip", "chip", "chip", "host"]
    assert report.mac_share == 1
    plan = neuro.convert(again, neuro.calibrate(again, [x]), report)
    deployed = neuro.deploy(again, plan)(x)
    wanted = module(x).detach()
    assert float((deployed - wanted).norm() / wanted.norm()) < 0.03


def test_paddings_by_name_are_those_of_layers(tmp_path: Path) -> None:
    parts = [nn.Conv2d(1, 2, 3, padding="same"), nn.ReLU(), nn.Conv2d(2, 2, 3, padding="valid")]
    module, x = nn.Sequential(*parts).eval(), torch.rand(2, 1, 5, 6)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "net.pt2")
    again, inputs = read_exported(tmp_path / "net.pt2")
    assert torch.equal(again(x), module(x))
    report = neuro.analyse(again, inputs)
    assert report.mapped == ("0", "2")
    assert report.mac_share == 1


def changed(path: Path, change: Any, record: str = "models/model.json") -> Path:
    """A copy of a file with one JSON record changed, or replaced by bytes."""
    other = path.with_name(f"changed_{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.partition("/")[2] == record:
                if callable(change):
                    document = json.loads(data)
                    change(document)
                    data = json.dumps(document).encode()
                else:
                    data = change
            new.writestr(info.filename, data)
    return other


def nodes(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["graph_module"]["graph"]["nodes"]


def pickled(document: dict[str, Any]) -> None:
    next(iter(document["config"].values()))["use_pickle"] = True


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        ("models/model.json", lambda d: d["schema_version"].update(major=3), "schema 3; this version reads 8"),
        ("models/model.json", b"{", "not readable as JSON"),
        ("models/model.json", b"{}", "do not fit together"),
        ("models/model.json", lambda d: nodes(d)[0].update(target="torch.ops.aten.from_file.default"), "has no rule here"),
        ("models/model.json", lambda d: nodes(d)[0].update(target="os.system"), "operation 'os.system' has no rule here"),
        ("models/model.json", lambda d: nodes(d)[2]["inputs"][0].update(name="nothing"), "has no argument 'nothing'"),
        ("data/weights/model_weights_config.json", pickled, "is a pickle or an object, and nothing is unpickled here"),
        ("data/weights/weight_0", b"1234", "its 4 bytes do not hold it"),
        ("byteorder", b"big", "not little-endian"),
    ],
)
def test_what_is_damaged_or_could_run_code_is_refused(record: str, change: Any, message: str, tmp_path: Path) -> None:
    path = changed(saved(tmp_path, "images")[2], change, record)
    with pytest.raises(ExportedError, match=message):
        read_exported(path)


def test_no_record_of_a_pickle_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    honest = exported._Archive.bytes
    monkeypatch.setattr(exported._Archive, "bytes", lambda self, name: opened.append(name) or honest(self, name))
    path = changed(saved(tmp_path, "branches")[2], b"\x80\x04cos\nsystem\n", "data/sample_inputs/model.pt")
    read_exported(path)
    assert "models/model.json" in opened
    assert not [name for name in opened if name.endswith(".pt")]


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = saved(tmp_path, "branches")[2].read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("a/b.json", "{}")
    with pytest.raises(ExportedError, match="cut short"):
        read_exported(tmp_path / "cut.pt2")
    with pytest.raises(ExportedError, match=r"'models/model.json' is not in it: no exported program of torch"):
        read_exported(tmp_path / "other.pt2")
    with pytest.raises(FileNotFoundError, match=r"none\.pt2: no such file"):
        read_exported(tmp_path / "none.pt2")


def test_sizes_that_are_left_open_are_refused(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=9)
    program = torch.export.export(nn.Linear(3, 2), (torch.rand(4, 3),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "open.pt2")
    with pytest.raises(ExportedError, match=r"size that is left open.*export without dynamic_shapes"):
        read_exported(tmp_path / "open.pt2")
