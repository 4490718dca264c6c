"""The floors of the house, read from the source: who may import whom, and which file may know which third party.

    experiments -> sparse_update, neuro -> hardware        (down only; the wings never meet)

The rules are tables below; a self-test plants violations in a tree of its own and asks that each is found.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "configs": set(),
    "hardware": set(),
    "neuro": {"hardware"},
    "sparse_update": {"hardware"},
    "experiments": {"configs", "hardware", "neuro", "sparse_update"},
}
WORKER = "neuro/lava_worker/"
ANYWHERE = ("configs/", "hardware/", "neuro/", "sparse_update/", "experiments/")

# Third party -> the files and folders that may import it. What is not in the table may be imported nowhere.
THIRD_PARTIES = {
    "numpy": ANYWHERE,
    "torch": ("neuro/", "sparse_update/", "experiments/"),
    "triton": ("sparse_update/step/triton_strips.py",),
    "scipy": ("experiments/", WORKER, "sparse_update/objectives/preference/watch.py"),
    "yaml": ("hardware/", "experiments/"),
    "sklearn": ("experiments/studies/digits.py", "experiments/samples/pictures.py"),
    "joblib": ("experiments/runs/sweeps/joblib_pool.py",),
    "submitit": ("experiments/runs/sweeps/cluster.py",),
    "rich": ("experiments/",),
    "argcomplete": ("experiments/commands/completion.py",),
    "matplotlib": ("experiments/",),
    "hydra": ("experiments/",),
    "omegaconf": ("experiments/",),
    "tensorboard": ("experiments/views/tracking.py",),
    "torch.utils.tensorboard": ("experiments/views/tracking.py",),
    "pynvml": ("hardware/meters/meter.py",),
    "zeus": ("hardware/meters/zeus.py",),
    "sanafe": ("experiments/studies/sanafe_worker.py",),
    "safetensors": (
        "sparse_update/loop/saving/files.py",
        "sparse_update/loop/saving/shards.py",
        "sparse_update/library/callbacks.py",
        "experiments/runs/samples/model.py",
    ),
    "tokenizers": ("sparse_update/data/tokens.py", "experiments/benches/reinforcing/trl_worker.py"),
    "snntorch": (
        "neuro/modules/spiking.py",
        "neuro/simulators/snntorch_backend.py",
        "experiments/benches/families/models.py",
        "experiments/benches/peers/float_peers.py",
    ),
    "spikingjelly": ("experiments/benches/peers/float_peers.py",),
    "norse": ("experiments/benches/peers/float_peers.py",),
    "nir": ("neuro/exchange/nir/",),
    "h5py": ("neuro/exchange/hdf5_worker.py",),
    "transformers": (
        "sparse_update/library/callbacks.py",
        "experiments/benches/attach_arms.py",
        "experiments/benches/families/models.py",
        "experiments/benches/generating/peer.py",
        "experiments/benches/reinforcing/trl_worker.py",
    ),
    "trl": ("experiments/benches/reinforcing/trl_worker.py",),
    "accelerate": ("sparse_update/library/callbacks.py",),
    "datasets": ("sparse_update/data/hub.py", "experiments/benches/reinforcing/trl_worker.py"),
    "pytorch_lightning": ("sparse_update/library/callbacks.py",),
    "peft": ("sparse_update/weights/lowrank.py",),
    "galore_torch": ("sparse_update/weights/lowrank.py",),
    "reasoning_gym": ("sparse_update/tasks/gym.py",),
    "lava": (WORKER,),
    "xylosim": ("neuro/simulators/xylo/worker.py",),
    "akida": ("neuro/simulators/akida/worker.py",),
}
# Read also by Python 3.10 in an environment that has numpy and Lava, and nothing of ours.
GRAPHS = ("__init__", "archive", "files", "kinds", "network", "synapses", "text", "values")
STANDALONE = (*(f"neuro/graph/{name}.py" for name in GRAPHS), WORKER)
STANDALONE_MAY = {"numpy", "scipy", "lava"}
# Formats that run code when they are read.
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def violations(root: Path) -> list[str]:
    """Every breach of the rules above in the packages under `root`, as "file:line: what"."""
    found = []
    for package in FLOORS:
        for path in sorted((root / package).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"), place)
            for line, name in _imports(tree, place):
                if problem := _import_problem(place, name):
                    found.append(f"{place}:{line}: {problem}")
            found += [f"{place}:{line}: {problem}" for line, problem in _calls_that_unpickle(tree)]
            if place.startswith(STANDALONE):
                try:
                    ast.parse(path.read_text(encoding="utf-8"), place, feature_version=(3, 10))
                except SyntaxError as error:
                    found.append(f"{place}:{error.lineno}: is no Python 3.10")
    return found


def _imports(tree: ast.AST, place: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, relative ones resolved, and of importlib.import_module("...") too."""
    package = place.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from torch.utils import tensorboard` names a module in the second half.
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and _dotted(node.func).split(".")[-1] in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def _import_problem(place: str, name: str) -> str | None:
    top, here = name.split(".")[0], place.split("/")[0]
    if top in sys.stdlib_module_names or top == "__future__":
        return f"imports {top}, which runs code from data" if top in PICKLES else None
    if place.startswith(STANDALONE):
        beside = place.startswith(WORKER) and (ROOT / WORKER / f"{top}.py").is_file()
        bare = not place.startswith(WORKER) or place == f"{WORKER}worker.py"  # which makes a bare `neuro` to load them from
        shared = bare and any(
            f"{name}.".startswith(f"{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}.")
            for file in STANDALONE
        )
        if top not in STANDALONE_MAY and not beside and not shared:
            return f"imports {name}, but runs under Python 3.10 without it"
    if top in FLOORS:
        allowed = top == here or top in FLOORS[here]
        return None if allowed else f"imports {name}: {here} may import {', '.join(sorted(FLOORS[here])) or 'no other'}"
    if top == "tests":
        return "imports the tests"
    if place.startswith(WORKER) and (ROOT / WORKER / f"{top}.py").is_file():
        return None
    rule = max((rule for rule in THIRD_PARTIES if f"{name}.".startswith(f"{rule}.")), key=len, default=None)
    if rule is None:
        return f"imports {name}, which is in no list of tests/test_floors.py"
    if not place.startswith(THIRD_PARTIES[rule]):
        return f"imports {name}, which belongs to {', '.join(THIRD_PARTIES[rule])}"
    return None


def _calls_that_unpickle(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        given = {word.arg: word.value for word in node.keywords}
        if name == "torch.load" and not _is_constant(given.get("weights_only"), True):
            yield node.lineno, "torch.load without weights_only=True"
        if name == "torch.save":
            yield node.lineno, "torch.save writes a pickle"
        if "allow_pickle" in given and not _is_constant(given["allow_pickle"], False):
            yield node.lineno, f"{name} with allow_pickle"


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_house_keeps_its_floors():
    assert violations(ROOT) == []


PLANTED = {
    "hardware/up.py": ("import neuro", "hardware may import no other"),
    "neuro/across.py": ("def f():\n    from sparse_update.gates.gate import band", "neuro may import hardware"),
    "sparse_update/across.py": ("import importlib\nimportlib.import_module('neuro.graph')", "imports neuro.graph"),
    "sparse_update/relative.py": ("from ..experiments import cli", "imports experiments.cli"),
    "neuro/simulators/board.py": ("import torch.utils.tensorboard as tb", "experiments/views/tracking.py"),
    "experiments/table.py": ("from torch.utils import tensorboard", "experiments/views/tracking.py"),
    "neuro/config.py": ("if True:\n    import hydra.core", "belongs to experiments/"),
    "hardware/plot.py": ("from matplotlib import pyplot", "belongs to experiments/"),
    "hardware/power.py": ("import pynvml", "belongs to hardware/meters/meter.py"),
    "experiments/chip.py": ("from lava.magma.core import x", "belongs to neuro/lava_worker/"),
    "neuro/store.py": ("from safetensors.torch import save_file", "belongs to sparse_update/loop/saving/files.py"),
    "experiments/spikes.py": ("import snntorch", "belongs to neuro/modules/spiking.py"),
    "neuro/new.py": ("import pandas", "in no list"),
    "neuro/graph/network.py": ("import torch", "runs under Python 3.10 without it"),
    "neuro/lava_worker/extra.py": ("from neuro.graph import load_graph", "runs under Python 3.10 without it"),
    "neuro/lava_worker/syntax.py": ("try:\n    pass\nexcept* ValueError:\n    pass", "is no Python 3.10"),
    "experiments/cache.py": ("from pickle import load", "runs code from data"),
    "experiments/read.py": ("import torch\ntorch.load('x')", "without weights_only=True"),
    "experiments/read2.py": ("import torch\ntorch.load('x', weights_only=False)", "without weights_only=True"),
    "experiments/write.py": ("import torch\ntorch.save({}, 'x')", "torch.save writes a pickle"),
    "neuro/arrays.py": ("import numpy as np\nnp.load('x', allow_pickle=True)", "np.load with allow_pickle"),
    "experiments/own.py": ("import tests", "imports the tests"),
}
HONEST = {
    "experiments/cli.py": "import hydra, neuro.graph, sparse_update\nfrom experiments import tracking",
    "experiments/views/tracking.py": "from torch.utils.tensorboard import SummaryWriter",
    "neuro/a.py": "from hardware.energy.account import Counts\nfrom . import b\nfrom neuro import b as c\nimport torch",
    "neuro/lava_worker/fine.py": "import numpy\nfrom lava.magma import x\nimport json",
    "experiments/read.py": "import torch\ntorch.load('x', weights_only=True)",
}


@pytest.mark.parametrize("place", PLANTED)
def test_a_planted_violation_is_found(tmp_path, place):
    source, message = PLANTED[place]
    _plant(tmp_path, {place: source})
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(f"{place}:")
    assert message in found[0]


def test_an_honest_tree_has_none(tmp_path):
    _plant(tmp_path, HONEST)
    assert violations(tmp_path) == []


def _plant(root: Path, files: dict[str, str]) -> None:
    for place, source in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(source)


# What a package may load when it is imported: the rest is for those who use it.
HEAVY = (
    "hydra",
    "omegaconf",
    "matplotlib",
    "tensorboard",
    "tokenizers",
    "safetensors",
    "pynvml",
    "snntorch",
    "datasets",
    "transformers",
    "accelerate",
    "pytorch_lightning",
    "peft",
    "sklearn",
    "joblib",
    "submitit",
    "nir",
    "lava",
)

# An extra that a module needs to be imported at all; nothing imports the module without it.
NEEDED_AT_IMPORT = {"triton": "sparse_update/step/triton_strips.py"}

WATCH = """
import importlib, os, sys
for name in {before}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # an optional extra
seen = []
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.fsdecode(args[0])
        if not path.endswith((".py", ".pyc", ".so")) and not path.startswith((sys.prefix, sys.base_prefix)):
            seen.append("opens " + path)
    elif event.startswith(("subprocess.", "os.fork", "os.posix_spawn", "os.system", "os.exec", "socket.")):
        seen.append(event + repr(args)[:100])
sys.addaudithook(watch)
for name in {names}:
    importlib.import_module(name)
if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
    seen.append("touches the GPU")
seen += ["loads " + name for name in {heavy} if name in sys.modules]
print("\\n".join(seen))
"""


def _importing(names: list[str], before: list[str], heavy: tuple[str, ...]) -> list[str]:
    code = WATCH.format(names=names, before=before, heavy=heavy)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


@pytest.mark.parametrize("package", FLOORS)
def test_importing_a_package_does_nothing_else(package):
    assert _importing([package], [], HEAVY) == []


def test_importing_every_module_touches_nothing():
    paths = [
        path
        for package in ("hardware", "neuro", "sparse_update", "experiments")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    places = [path.relative_to(ROOT).as_posix() for path in paths]
    away = [place for party, place in NEEDED_AT_IMPORT.items() if importlib.util.find_spec(party) is None]
    mine = [place for place in places if not place.startswith(WORKER) and place not in away]
    names = [place.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for place in mine]
    third = {
        name
        for path, place in zip(paths, places, strict=True)
        for _, name in _imports(ast.parse(path.read_text(encoding="utf-8")), place)
        if name.split(".")[0] in THIRD_PARTIES and name.split(".")[0] not in {"lava", "snntorch", "nir"}
    }
    # Third parties first, with the modules of theirs that ours name, so that what is seen afterwards is ours.
    before = sorted(third | {name.rsplit(".", 1)[0] for name in third})
    assert _importing(names, before, ()) == []
