"""The compat command: table, JSON as the last line, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.commands.compat import main
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.transformer import ModelConfig, Transformer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoint of a small model."""
    torch.manual_seed(0)
    config = ModelConfig(width=32, layers=2, heads=2, context=16, vocab_size=64, tie_embeddings=True)
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    save_checkpoint(folder / "checkpoint", Transformer(config).state_dict(), {}, {"model": vars(config), "step": 3})
    return folder


def command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a document goes that is longer than a line may be


def whole(line: str) -> dict:
    found = json.loads(line)
    return json.loads(Path(found["file"]).read_text()) if "file" in found else found


def last(capsys: pytest.CaptureFixture) -> dict:
    return whole(capsys.readouterr().out.splitlines()[-1])


def test_a_run_and_its_checkpoint_give_the_same_table(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(trained) == 0
    out = capsys.readouterr().out
    document = whole(out.splitlines()[-1])
    assert "attention scores" in out
    assert "on loihi2, graded route: " in out
    assert "embed.weight = head.weight" in out
    linear, attention = 12 * 32 * 32 * 2 + 32 * 64, 2 * 16 * 32 * 2
    assert document["macs_per_token"] == linear + attention
    assert document["macs_share"] == pytest.approx(linear / (linear + attention))
    assert (document["chip"], document["route"], document["context"], document["fits"]) == ("loihi2", "graded", 16, True)
    assert command(trained / "checkpoint", "--json") == 0
    again = capsys.readouterr().out
    assert len(again.splitlines()) == 1
    assert whole(again)["operations"] == document["operations"]
    norms = [op for op in document["operations"] if op["kind"] == "normalisation"]
    assert len(norms) == 5
    assert all(0 < op["error_bound"] < 0.01 for op in norms)


def test_a_shorter_context_has_fewer_products(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(trained, "--context", 4, "--json") == 0
    assert last(capsys)["macs_per_token"] == 12 * 32 * 32 * 2 + 32 * 64 + 2 * 4 * 32 * 2


def test_loihi1(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(trained, "--chip", "loihi1") == 0
    out = capsys.readouterr().out
    assert "on loihi1, rate route" in out
    assert command(trained, "--chip", "loihi1", "--route", "graded") == 1
    captured = capsys.readouterr()
    assert "payload_bits 8 of 1" in captured.out
    assert "take route='rate'" in captured.out
    document = whole(captured.out.splitlines()[-1])
    assert document["mapped"] == []
    assert document["macs_share"] == 0


def test_too_few_chips(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = ModelConfig(width=256, layers=2, heads=2, context=4, vocab_size=24000)
    save_checkpoint(tmp_path / "checkpoint", Transformer(config).state_dict(), {}, {"model": vars(config)})
    assert command(tmp_path, "--chips", 1) == 1
    document = last(capsys)
    assert document["fits"] is False
    assert document["limit"]["resource"] == "cores"
    assert document["limit"]["need"] > document["limit"]["have"] == 128
    assert any("more chips" in remedy for remedy in document["remedies"])
    assert command(tmp_path, "--chips", 3, "--json") == 0
    assert 128 < last(capsys)["cores"] <= 3 * 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["RUN", "--chip", "loihi3"], "chip 'loihi3' is unknown; known: loihi1, loihi2"),
        (["RUN", "--context", "17"], "--context is 17; this model reads 1 to 16"),
        (["RUN", "--chips", "0"], "--chips is 0"),
        (["EMPTY"], "checkpoint"),
    ],
)
def test_wrong_commands(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    named = [word.replace("RUN", str(trained)).replace("EMPTY", str(tmp_path)) for word in words]
    assert command(*named) == 2
    assert message in capsys.readouterr().err


def test_damaged_and_diverged(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = ModelConfig(width=32, layers=1, heads=2, context=16, vocab_size=64)
    model = Transformer(config)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    save_checkpoint(tmp_path / "nan", model.state_dict(), {}, {"model": vars(config)})
    assert command(tmp_path / "nan") == 2
    assert "'head.weight' holds 1 NaN" in capsys.readouterr().err
    save_checkpoint(tmp_path / "other", {"w": torch.zeros(2)}, {}, {"step": 1})
    assert command(tmp_path / "other") == 2
    assert "does not say which model it holds" in capsys.readouterr().err
    file = tmp_path / "nan" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert command(tmp_path / "nan") == 2
    assert "nan" in capsys.readouterr().err


def test_the_table_is_text_for_tensorboard(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    board = tmp_path / "board"
    assert command(trained, "--tensorboard", board) == 0
    shown = capsys.readouterr().out.splitlines()
    found = EventAccumulator(str(board)).Reload()
    (text,) = (
        found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"] if "compat" in tag
    )
    assert text.startswith("| operation | count | verdict |")
    assert all(f"| {line.split('  ')[0]} |" in text for line in shown[1:4])
    assert command(trained, "--tensorboard", board) == 2  # not over an older one
    assert "already holds a run" in capsys.readouterr().err


MODELS = """
import torch
from torch import nn
import sparse_update


def alone():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


def pictures():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(3, 4, 4)


def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))


def task():
    batches = [(torch.rand(5, 6), torch.zeros(5, dtype=torch.long))]
    return sparse_update.UserTask(model=alone, train=batches, held_out=batches)


def number():
    return 3
"""


@pytest.fixture
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """my_compat_models.py in the working folder."""
    (tmp_path / "my_compat_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("words", "macs", "mapped"),
    [
        (["alone"], 6 * 4 + 4 * 2, ["0", "2"]),
        (["pictures"], 32, ["1"]),
        (["task"], 6 * 4 + 4 * 2, ["0", "2"]),
        (["convolution", "--shape", "2,1,4,4"], 2 * 9 * 4 + 16, None),
    ],
)
def test_a_reference_to_a_function(
    references: None, capsys: pytest.CaptureFixture, words: list[str], macs: int, mapped: list[str] | None
) -> None:
    name, *more = words
    assert command(f"my_compat_models:{name}", *more, "--json") == 0
    document = last(capsys)
    assert document["module"] == f"my_compat_models:{name}"
    assert document["macs_per_token"] == macs
    assert mapped is None or document["mapped"] == mapped
    assert "context" not in document


def test_an_exported_program(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(6, 4), (torch.rand(3, 6),)), tmp_path / "net.pt2")
    assert command(tmp_path / "net.pt2", "--json") == 0
    document = last(capsys)
    assert (document["program"], document["macs_per_token"], document["tokens"]) == (str(tmp_path / "net.pt2"), 24, 3)
    (tmp_path / "net.pt2").write_bytes(b"PK")
    assert command(tmp_path / "net.pt2") == 2
    assert "no exported program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my_compat_models:number"], "returns int; a torch module, (module, example inputs) or a UserTask is needed"),
        (["my_compat_models:nothing"], "my_compat_models has no nothing"),
        (["no_such_models:alone"], "there is no module no_such_models"),
        (["my_compat_models:convolution"], "return (module, example inputs), or give --shape"),
        (["my_compat_models:alone", "--shape", "1,x"], "--shape is 1,x; whole numbers from 1"),
        (["my_compat_models:alone", "--shape", "1,7"], "the module does not run on the example inputs"),
        (["my_compat_models:alone", "--context", "3"], "--context is 3; it goes with a trained run"),
        (["nowhere", "--shape", "1,2"], "--shape goes with MODULE:FUNCTION"),
        (["none.pt2"], "none.pt2: no such file"),
    ],
)
def test_wrong_references(references: None, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert command(*words) == 2
    assert message in capsys.readouterr().err
