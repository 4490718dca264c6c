"""What `compare` prints and writes: table, JSON, pictures, TensorBoard."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.compare import CompareConfig, main, write
from experiments.comparison.collection import collect
from experiments.comparison.document import to_json
from experiments.runs.hydra_app import ConfigError
from experiments.views.figures import figure
from experiments.views.tables import summary, table
from experiments.views.tracking import MOST_SELECTED, boards, write_comparison
from tests.experiments.comparison.records import deployed_record

RunMaker = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]


def test_files_picture_and_tensorboard(tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker) -> None:
    for arm, loss in (("dense", 1.75), ("random", 1.8), ("surprise", 1.7)):
        for seed in range(2):
            make_run(arm, loss + 0.01 * seed, seed=seed)
    make_deployment()
    make_deployment(name="deploy-other-conversion")
    comparison = collect([tmp_path])
    assert len(to_json(comparison)["deployments"]) == 2
    assert len(figure(comparison).axes) == 2
    out = tmp_path / "comparison"
    write(comparison, out)
    write(comparison, out)  # a second time replaces, and adds no double run
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "comparison.svg").read_text()
    assert "## Stream clean" in (out / "comparison.md").read_text()
    board = out / "tensorboard"
    runs = {str(path.parent.relative_to(board)) for path in board.rglob("events.out.tfevents.*")}
    deployed = {"clean/deployed surprise", "clean/deployed surprise 2"}
    assert runs == {".", "clean/dense", "clean/random", "clean/surprise", *deployed}
    top = EventAccumulator(str(board)).Reload()
    assert top.Tags()["images"] == ["comparison"]
    assert {"custom_scalars__config__", "comparison/text_summary", "energy per token/text_summary"} <= set(
        top.Tags()["tensors"]
    )
    arm = EventAccumulator(str(board / "clean" / "dense")).Reload()
    assert arm.Scalars("val_loss_nats_by_reference_ms/clean")[-1].step == 20_000
    assert arm.Scalars("Result/loss_nats")[0].value == pytest.approx(1.755)
    energy = EventAccumulator(str(board / "clean" / "deployed surprise")).Reload()
    assert [e.value for e in energy.Scalars("energy_nj_per_token/mid")] == pytest.approx([2000.0, 500.0])
    assert len(collect([tmp_path]).excluded) == 0  # the comparison's own folder is no run


def test_command_prints_table_verdicts_and_json_last(
    tmp_path: Path, make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("dense", 1.75)
    make_run("surprise", 1.70)
    assert main([f"folder={tmp_path}", "tensorboard=false"]) == 0
    printed = capsys.readouterr().out.splitlines()
    last = json.loads(printed[-1])
    document = json.loads(Path(last["file"]).read_text())
    assert Path(last["file"]) == tmp_path / "comparison" / "comparison.json"
    assert last["verdicts"] == document["verdicts"]
    assert last["streams"]["clean"]["surprise"]["loss_nats"] == document["streams"]["clean"]["surprise"]["loss_nats"]
    assert any(line.startswith("clean: surprise against dense") for line in printed)


def test_nothing_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([f"folder={tmp_path / 'empty'}"]) == 1
    assert "no finished run" in capsys.readouterr().err
    assert main([f"folder={tmp_path / 'absent'}"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="give folder=FOLDER"):
        CompareConfig()


def test_unknown_key_in_a_fresh_process_from_another_folder(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from experiments.compare import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "foldr=runs/demo"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == (
        "compare: unknown configuration key 'foldr'; did you mean folder? (--cfg job prints all of them)"
    )
    assert list(tmp_path.iterdir()) == []  # Hydra leaves nothing behind


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_is_no_wider_than_the_terminal(
    width: int, tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker
) -> None:
    reason = "NVML: no NVIDIA driver answers (NVML Shared Library Not Found); RAPL: /sys/class/powercap does not exist"
    for arm, loss in (("dense", 1.75), ("random", 1.8), ("surprise", 1.7)):
        for seed in range(2):
            make_run(arm, loss + 0.01 * seed, seed=seed, result={"energy_reason": f"not measured: {reason}"})
    source = "SANA-FE 8951ab0, arch/loihi.yaml (fitted to Loihi silicon; IEEE TCAD 2025)"
    energy = [deployed_record()["energy"][0] | {"source": source}]
    make_deployment(energy=energy)
    make_deployment(name="deploy-other-conversion", arm="dense", energy=energy)
    comparison = collect([tmp_path])
    text = table(comparison, width)
    assert max(map(len, text.splitlines())) <= width
    flowing = " ".join(text.split())
    for part in (source if width > 80 else "SANA-FE", "surprise, deployed", "1.7050 [1.6415, 1.7685]", ">= 2 uJ", "40,000"):
        assert part in flowing, part
    assert flowing.count(f"Energy: measured in 0 of 6 runs; {reason}.") == 1
    assert flowing.count("not in the sum: static: no time model") == 1
    assert "Other remarks: as above." in text
    whole = table(comparison).splitlines()
    assert any(line.startswith("  surprise, deployed") and line.endswith(">= 2 uJ") for line in whole), "one line, no limit"


def test_a_board_of_twenty_runs_is_ticked_at_once(tmp_path: Path, make_run: RunMaker) -> None:
    for i in range(20):
        make_run("dense" if not i else f"surprise_{i}", 1.75 + 0.001 * i)
    comparison = collect([tmp_path])
    alone = write_comparison(tmp_path / "alone", comparison, {}, {})
    assert len(boards(alone)) == 21
    shared = write_comparison(tmp_path / "shared", comparison, {}, {}, beside=20)
    assert len(boards(shared)) + 20 <= MOST_SELECTED
    make_run("dense", 1.76, seed=1)
    again = write_comparison(tmp_path / "again", collect([tmp_path]), {}, {}, beside=21)
    assert {path.name for path in boards(again)} == {"again", "dense"}, "a mean over seeds stands in no run"


def test_differences_without_a_test_do_not_flood_the_terminal(
    tmp_path: Path, make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(12):
        make_run("dense" if not i else f"surprise_{i}", 1.75 + 0.001 * i)
    for seed in (1, 2):
        make_run("dense", 1.75 + 0.01 * seed, seed=seed)
        make_run("surprise_1", 1.70 + 0.01 * seed, seed=seed)
    assert main([f"folder={tmp_path}", "tensorboard=false"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clean: ")]
    assert [line.split(":")[1] for line in printed] == [" surprise_1 beats dense"]
    document = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert len(document["verdicts"]) == 11
    page = (tmp_path / "comparison" / "comparison.html").read_text()
    assert "<summary>10 differences without a test" in page
    assert page.index("beats dense: <span") < page.index("<details>")
    assert 'class="no">no</span> test possible' not in page


def like_the_demo(make_run: RunMaker, make_deployment: RunMaker) -> None:
    for stream in ("clean", "noisy"):
        for seed in range(3):
            for arm, loss, step in (("dense", 1.75, 0.01), ("random", 1.8, 0.012), ("surprise", 1.7, 0.009)):
                reason = {"energy_reason": "not measured: no meter"}
                make_run(arm, loss + step * seed, seed=seed, stream=stream, result=reason)
        make_deployment(stream=stream, name=f"{stream}-deploy")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_first_look_at_a_comparison_like_the_demos_fits_a_screen(
    width: int, tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker
) -> None:
    like_the_demo(make_run, make_deployment)
    text = summary(collect([tmp_path]), width)
    lines = text.splitlines()
    assert len(lines) <= 55
    assert max(map(len, lines)) <= width
    assert text.count("1.7600 [1.7352, 1.7848]") == 2, "each stream's dense row, with its interval"
    assert lines[-1].strip().endswith(").")
    assert " ".join(text.split()).count("surprise beats random at the same rate: yes; 0.1030 nats lower") == 2
    assert "loss nats: held-out, per token, lower is better" in " ".join(text.split())
    assert text.count("energy/token: loihi1_sanafe") == (1 if width >= 100 else 0)


def test_on_a_terminal_of_80_columns_the_verdicts_are_the_last_that_is_seen(
    tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker
) -> None:
    like_the_demo(make_run, make_deployment)
    read, write_end = pty.openpty()
    termios.tcsetwinsize(write_end, (50, 80))
    command = [sys.executable, "-m", "experiments.compare", "folder=.", "tensorboard=false"]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment["PYTHONPATH"] = str(ROOT)
    shown = bytearray()
    with subprocess.Popen(command, cwd=tmp_path, stdout=write_end, stderr=write_end, env=environment) as process:
        os.close(write_end)
        while True:
            try:
                piece = os.read(read, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(read)
    assert process.returncode == 0, shown.decode()
    assert b"\x1b[1;32myes" in shown, "an answer is coloured"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r", "")
    lines = plain.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("written to ") for line in lines[-3:])
    last = " ".join(plain.split("clean: surprise beats dense")[1].split())
    assert "noisy: surprise beats random at the same rate: yes" in last
