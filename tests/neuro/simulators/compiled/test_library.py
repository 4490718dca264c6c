"""The build of the C loops in the user's cache: whole or not there, the user's own, by one process at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware import building
from hardware.building import Library
from neuro.graph import Population, Projection, SpikingGraph
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.compiled import library, program
from neuro.simulators.fixed_point import simulate

COMPILER = next((name for name in building.COMPILERS if building.shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
GRAPH = SpikingGraph(
    (Population("x", "input", 3), Population("y", "lif", 3, {"du": 700, "dv": 90, "vth": 60, "bias_mant": 11})),
    (Projection("w", "x", "y", "a_in", 2 * np.eye(3, dtype=np.int64), num_message_bits=8),),
    ("y",),
)
X = {"x": np.full((1, 20, 3), 90)}
ADD = "int add(int a, int b) { return a + b; }\n"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: Any) -> Path:
    """One tiny source instead of ours, in a cache and a folder for temporary files of the test's own; its parent folder."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "sources" / "add.c").write_text(ADD)
    monkeypatch.setattr(library, "LOOPS", Library(tmp_path / "sources", "simulator", "the simulator's loops"))
    monkeypatch.setattr(building.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def builds(monkeypatch: Any) -> list[str]:
    """What was compiled meanwhile."""
    made: list[str] = []
    original = building._compile

    def noted(compiler: str, sources: Sequence[Path], path: str, what: str) -> None:
        made.append(path)
        original(compiler, sources, path, what)

    monkeypatch.setattr(building, "_compile", noted)
    return made


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("spikegate*/*.so"))


@needs_compiler
def test_a_build_is_made_once_and_loaded_from_the_cache_afterwards(small: Path, builds: list[str]) -> None:
    assert library.LOOPS.load().add(2, 3) == 5
    (path,) = kept(small / "cache")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert library.LOOPS.load().add(2, 4) == 6
    assert len(builds) == 1
    assert [p.name for p in path.parent.iterdir() if p.name not in (path.name, "lock")] == []  # nothing half-made
    (small / "sources" / "add.c").write_text(ADD.replace("a + b", "a - b"))
    assert library.LOOPS.load().add(2, 3) == -1  # another version is another file
    assert len(builds) == len(kept(small / "cache")) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "not ours", "a folder"])
def test_a_damaged_file_in_the_cache_is_built_anew(small: Path, builds: list[str], damage: str) -> None:
    library.LOOPS.load()
    (path,) = kept(small / "cache")
    whole = path.read_bytes()
    path.unlink()  # the loaded one stays as it is
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif damage == "not ours":
        path.write_bytes(whole)
        path.chmod(0o722)
    elif damage == "empty":
        path.touch()
    else:
        path.mkdir()
        with pytest.raises(building.BuildError, match=r"could not be built in .*spikegate"):
            library.LOOPS.load()
        return
    assert library.LOOPS.load().add(2, 3) == 5
    assert len(builds) == 2
    assert path.stat().st_size == len(whole)
    assert building.is_ours(path)


@needs_compiler
def test_a_folder_that_others_may_write_into_is_passed_over(small: Path, builds: list[str]) -> None:
    library.LOOPS.load()
    (path,) = kept(small / "cache")
    path.parent.chmod(0o777)
    assert library.LOOPS.load().add(2, 3) == 5
    assert len(kept(small / "temporary")) == 1
    (small / "temporary" / f"spikegate-{os.getuid()}").chmod(0o770)
    assert building.cache_folder() is None  # then a build of this process's own, which leaves nothing behind
    assert library.LOOPS.load().add(2, 3) == 5
    assert len(builds) == 3
    assert len(list((small / "temporary").iterdir())) == 1


def test_a_folder_of_another_user_and_a_link_are_not_ours(tmp_path: Path, monkeypatch: Any) -> None:
    assert building.is_ours(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert not building.is_ours(tmp_path / "link")
    other = os.geteuid() + 1
    monkeypatch.setattr(building.os, "geteuid", lambda: other)
    assert not building.is_ours(tmp_path)


@needs_compiler
def test_a_home_that_cannot_be_written_gives_way_to_the_folder_for_temporary_files(small: Path, monkeypatch: Any) -> None:
    home = small / "home"
    home.mkdir()
    (home / ".cache").write_text("a file, below which nobody can make a folder")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the specification has ignored
    assert library.LOOPS.load().add(2, 3) == 5
    assert len(kept(small / "temporary")) == 1


@needs_compiler
def test_two_processes_at_once_build_one_file(small: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hardware import building;"
        "made = []; whole = building._compile;"
        "building._compile = lambda *given: (made.append(1), whole(*given));"
        "print(building.Library(Path(sys.argv[1]), 'x', 'loops').load().add(2, 3), len(made))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(small / "sources")]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].split() for process in both)
    assert said == [["5", "0"], ["5", "1"]]
    assert len(kept(small / "cache")) == 1


@pytest.fixture
def forgotten() -> Any:
    """What this process found out about its library is forgotten before and after."""
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def test_without_a_compiler_one_line_says_so_and_torch_gives_the_same(forgotten: Any, monkeypatch: Any) -> None:
    plain = simulate(GRAPH, X, record=RECORD_ALL, fused=False)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(
        UserWarning, match=r"^no C compiler is installed \(cc, gcc, clang\); so the simulator runs in plain torch"
    ) as said:
        first = simulate(GRAPH, X, record=RECORD_ALL)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = simulate(GRAPH, X, record=RECORD_ALL, fused=True)
    assert compare(plain, first).equal
    assert compare(plain, second).equal
    assert plain.populations["y"].updates_active > 0


@needs_compiler
def test_a_compiler_that_fails_is_one_line_too(small: Path, forgotten: Any) -> None:
    (small / "sources" / "add.c").write_text("int add(int a, int b) { return a + ; }\n")
    with pytest.warns(UserWarning, match=r"^the C compiler .* fails on the simulator's loops \(.*error: .*\); so the sim"):
        assert library.library() is None
    assert kept(small / "cache") == []
    assert not any((small / "cache" / "spikegate").glob(".*"))


@needs_compiler
def test_the_default_call_takes_the_loops_in_c(monkeypatch: Any) -> None:
    taken = []
    original = program.run_members
    monkeypatch.setattr(program, "run_members", lambda *given: (taken.append(1), original(*given))[1])
    simulate(GRAPH, X, fused=False)
    assert taken == []
    simulate(GRAPH, X)
    assert taken == [1]
