"""Nobody let in: names, settings, records and sweep files that try to run, read or write something else are refused, or
shown as they are and do nothing."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from experiments.compare import CompareConfig, compare
from experiments.comparison.collection import collect
from experiments.rerun import rerun
from experiments.runs.hydra_app import ConfigError, to_dataclass
from experiments.runs.sweeps.reading import SweepError, read_sweep
from experiments.runs.training.config import TrainConfig
from experiments.views.tables import markdown
from hardware.markdown import code, fenced, line, row
from hardware.names import as_file_name, check_file_name
from tests import mutations
from tests.experiments.comparison.records import arm_record, deployed_record

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hardware", "neuro", "sparse_update", "experiments", "configs")
HOSTILE = (
    "<script>alert(1)</script>",
    "a|b\\|c",
    "`code` ``more``",
    "two\nlines\n\n# head\n\n- item",
    "![x](http://example.invalid/x.png) [y](javascript:alert(1)) <http://example.invalid>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{$ and $x$",
    "../../../outside",
    "]]></svg><style>*{}</style>",
    "```\nout of the fence",
)
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")


class Elements(HTMLParser):
    """Start tags and their attributes, in order, and the text outside of script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._in = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in == "script" else self.words).append(data)


def run_folder(folder: Path, stream: str, arm: str, **info: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"schema": 1, "kind": "train", "status": "finished", "stream": stream, "arm": arm, "seed": 0, **info}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "result.json").write_text(json.dumps(arm_record(1.7, notes=[stream])))
    (folder / "config.yaml").write_text(yaml.safe_dump({"optim": {"lr": stream}, "gate": {"name": arm}}))
    curve = [{"step": i, "reference_s": 2.0 * i, "val_loss_nats": 3.0 / (1 + i)} for i in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of runs and a deployment whose names and settings try everything at once."""
    top = tmp_path_factory.mktemp("hostile")
    for number, name in enumerate(HOSTILE):
        run_folder(top / "in" / f"r{number}", "a " + HOSTILE[number % 3], name)
    run_folder(top / "in" / "odd", HOSTILE[7], HOSTILE[0])
    (top / "in" / "deploy").mkdir()
    info = {"schema": 1, "kind": "deploy", "status": "finished", "stream": "a " + HOSTILE[0], "arm": HOSTILE[5], "seed": 0}
    (top / "in" / "deploy" / "run.json").write_text(json.dumps(info))
    (top / "in" / "deploy" / "deploy.json").write_text(json.dumps(deployed_record(ran_on=HOSTILE[5], arm=HOSTILE[5])))
    (top / "in" / HOSTILE[0].replace("/", "")).mkdir()
    (top / "in" / HOSTILE[0].replace("/", "") / "run.json").write_text(json.dumps({"schema": HOSTILE[5]}))
    compare(CompareConfig(folder=str(top / "in"), out=str(top / "out")))
    return top


def test_the_page_holds_hostile_names_as_words_only(compared: Path) -> None:
    page = Elements((compared / "out" / "comparison.html").read_text(encoding="utf-8"))
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1
    assert not {"img", "iframe", "object", "base", "link", "form"} & set(names)
    assert names.count("style") == 1 + names.count("svg")  # the page's own, and that of each picture
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        assert not any(str(value).strip().lower().startswith("javascript:") for value in attributes.values())
    assert "alert" not in "".join(page.scripts)
    words = " ".join(" ".join(page.words).split())
    for name in HOSTILE:
        assert " ".join(name.split()) in words, name


def test_the_markdown_holds_hostile_names_as_words_only(compared: Path) -> None:
    text = (compared / "out" / "comparison.md").read_text(encoding="utf-8")
    tokens = MARKDOWN.parse(text)
    inner = [part for token in tokens for part in token.children or []]
    assert not [t.content for t in (*tokens, *inner) if t.type in ("html_block", "html_inline", "link_open", "fence")]
    pictures = [str(part.attrs["src"]) for part in inner if part.type == "image"]
    assert pictures
    assert all(not Path(place).is_absolute() and (compared / "out" / place).is_file() for place in pictures)
    heads = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "head" not in heads
    assert "item" not in [token.content for token in tokens if token.type == "inline"]


def test_everything_that_a_comparison_writes_lies_in_its_folder(compared: Path) -> None:
    assert sorted(path.name for path in compared.iterdir()) == ["in", "out"]
    assert not [path for path in compared.parent.rglob("*outside*") if compared not in path.parents]
    assert list((compared / "out" / "tensorboard").rglob("events.*"))


NAMES = st.text(st.sampled_from("ab|\\`$<>[]()!#*_-\n\t. /&\"'{}:=~"), max_size=30)


@mutations.few(300)
@given(st.lists(NAMES, min_size=1, max_size=4), NAMES)
def test_any_name_in_markdown_stays_where_it_is_put(cells: list[str], name: str) -> None:
    tokens = MARKDOWN.parse("\n".join([row(["h"] * len(cells)), row(["---"] * len(cells)), row(cells)]))
    assert [t.type for t in tokens].count("td_open") == len(cells)
    assert [t.type for t in tokens].count("tr_open") == 2
    inline = [part for t in MARKDOWN.parse(f"- x {line(name)}") for part in t.children or []]
    assert not {part.type for part in inline} & {"html_inline", "link_open", "image"}
    coded = [part for t in MARKDOWN.parse(f"x {code(name)} y") for part in t.children or []]
    if name.strip():
        assert [part.content for part in coded if part.type == "code_inline"] == [" ".join(name.split())]
    block = MARKDOWN.parse(fenced(name))
    assert [(t.type, t.content.strip("\n")) for t in block] == [("fence", name.rstrip().strip("\n"))]


@given(st.text(max_size=300))
def test_any_name_as_a_file_name_stays_in_its_folder(name: str) -> None:
    made = as_file_name(name)
    assert check_file_name("name", made, ValueError) == made
    assert (Path("/top") / made).parent == Path("/top")
    assert Path("/top", made).resolve().parent == Path("/top")
    assert "\0" not in made


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "x" * 201])
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(SweepError, match="becomes the name of a folder"):
        check_file_name("arm", name, SweepError)


def test_a_run_without_a_folder_of_its_own_goes_into_ours() -> None:
    for stream, arm in (("../../x", "dense"), ("clean", "/etc/x"), ("\0", "..")):
        assert TrainConfig(stream=stream, arm=arm).folder.parent == Path("runs/train")
    assert TrainConfig(stream="clean", arm="a b").folder == Path("runs/train/clean-a b-tiny-s0")


# Settings


@dataclass
class Inner:
    name: str = "x"


@dataclass
class Settings:
    text: str = ""
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "${ oc.env : HOME }", "a ${oc.env:HOME,b} c", "${oc.decode:x}", "${now:%Y}", "${hydra:job.name}"],
)
@pytest.mark.parametrize("key", ["text", "inner", "free"])
def test_settings_read_no_environment(key: str, value: str) -> None:
    from omegaconf import OmegaConf

    given_: dict[str, Any] = {"text": value, "inner": {"name": value}, "free": {"deep": [{"x": value}]}}
    with pytest.raises(ConfigError, match="asks for something outside of the settings"):
        to_dataclass(OmegaConf.create({key: given_[key]}), Settings)
    assert to_dataclass(OmegaConf.create({"text": "${inner.name}"}), Settings).text == "x"


def test_a_target_in_settings_is_an_unknown_key() -> None:
    from omegaconf import OmegaConf

    with pytest.raises(ConfigError, match="unknown configuration key"):
        to_dataclass(OmegaConf.create({"inner": {"_target_": "os.system", "name": "x"}}), Settings)


# Sweep files

ARMS: dict[str, Any] = {"dense": {}}
SOUND = {"folder": "runs/x", "seeds": [0], "budget_tokens": 10, "arms": ARMS}


@pytest.mark.parametrize(
    "change",
    [
        {"settings": ["hydra.launcher._target_=os.system"]},
        {"settings": ["hydra/launcher=x"]},
        {"settings": ["+hydra.run.dir=/tmp/x"]},
        {"settings": ["--config-dir=/tmp"]},
        {"settings": ["-m"]},
        {"settings": ["run=/tmp/elsewhere"]},
        {"base": ["resume=true"]},
        {"settings": "gate=surprise"},
        {"arms": {"dense": {"set": ["++x._target_=os.system"]}}},
        {"arms": {"dense": {"grid": {"run": ["/tmp/a", "/tmp/b"]}}}},
        {"arms": {"../../x": {}}},
        {"arms": {"a/b": {}}},
    ],
)
def test_a_sweep_file_sets_its_own_runs_alone(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SOUND))
    read_sweep(path)
    path.write_text(yaml.safe_dump({**SOUND, **change}))
    with pytest.raises(SweepError, match=r"of Hydra's own|becomes the name of a folder|a list of KEY=VALUE"):
        read_sweep(path)


# Records of runs

TRAINED = {"trainer": {}, "data": {"name": "shakespeare"}}


def recorded(folder: Path, settings: Any, **info: Any) -> Path:
    run_folder(folder, "clean", "dense", command="python -c 'import os'", versions={}, git={}, **info)
    result = arm_record(1.7, steps=3)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "deploy.json").write_text(json.dumps(deployed_record()))
    (folder / "config.yaml").write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return folder


OURS = "tests_no_such_module"
RECORDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a module": ({**TRAINED, "module": f"{OURS}:task"}, {}, "code that is not of this package"),
    "a plugin of data": ({**TRAINED, "data": {"plugins": [OURS]}}, {}, "code that is not of this package"),
    "a plugin of the gate": ({**TRAINED, "gate": {"plugins": [OURS]}}, {}, "code that is not of this package"),
    "a target": ({**TRAINED, "model": {"_target_": "os.system"}}, {}, "unknown configuration key"),
    "a target on top": ({**TRAINED, "_target_": "os.system"}, {}, "unknown configuration key"),
    "the environment": ({**TRAINED, "stream": "${oc.env:HOME}"}, {}, "asks for something outside"),
    "an object of Python": ("trainer: !!python/object/apply:os.system ['true']", {}, "not readable as YAML"),
    "another kind": (TRAINED, {"kind": "os.system"}, "is no finished training run"),
    "no settings": ("[1, 2]", {}, "settings by name are needed"),
    "an unknown key": ({**TRAINED, "hook": "x"}, {}, "unknown configuration key"),
    "a trainer of another form": ({"trainer": "x"}, {}, "trainer"),
    "a deployment with code": ({"run": "x", "module": f"{OURS}:f"}, {"kind": "deploy"}, "code that is not of this package"),
    "a deployment's environment": ({"run": "${oc.env:HOME}"}, {"kind": "deploy"}, "asks for something outside"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_runs_nothing_but_training_and_deployment(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, info, message = RECORDS[case]
    ran = tmp_path / "ran"
    (tmp_path / f"{OURS}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = recorded(tmp_path / "run", settings, **info)
    before = sorted(tmp_path.rglob("*"))
    assert rerun(folder) in (1, 2)
    assert message in capsys.readouterr().err
    assert not ran.exists()
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


@mutations.few(25)
@given(st.data())
def test_a_changed_record_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = recorded(tmp_path_factory.mktemp("r") / "run", {**TRAINED, "run": "x", "seed": 0}, kind="train")
    (folder / "config.yaml").write_bytes(data.draw(mutations.yaml_of({"trainer": {"init_from": "x"}, "odd": 1})))
    assert rerun(folder) in (1, 2)


# The source


def calls(path: Path) -> list[tuple[int, str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(node.lineno, ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> str:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), "")


def wrong(name: str, call: ast.Call) -> bool:
    last = name.rsplit(".", 1)[-1]
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "marshal.loads"):
        return True
    if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve") and last in (
        "load",
        "loads",
        "Unpickler",
    ):
        return True
    if name == "torch.load":
        return keyword(call, "weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return keyword(call, "allow_pickle") != "False"
    if name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load"):
        return True
    if last in ("run", "Popen", "check_output", "call", "check_call") and keyword(call, "shell") not in ("", "False"):
        return True
    return last in ("instantiate", "get_class", "get_method", "get_object", "extractall", "register_new_resolver")


def test_nothing_in_the_source_runs_what_a_file_says() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(paths) > 300
    found = [
        f"{path.relative_to(ROOT)}:{at}: {name}" for path in paths for at, name, call in calls(path) if wrong(name, call)
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["eval(x)", "pickle.loads(x)", "torch.load(x)", "np.load(x)", "yaml.load(x, Loader=L)", "subprocess.run(x, shell=True)",
     "hydra.utils.instantiate(x)", "tarfile.open(x).extractall()"],
)  # fmt: skip
def test_the_look_at_the_source_finds_what_it_looks_for(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    assert any(wrong(name, call) for _, name, call in calls(tmp_path / "x.py"))


def test_hostile_names_are_collected_as_they_are(tmp_path: Path) -> None:
    run_folder(tmp_path / "r", HOSTILE[0], HOSTILE[1])
    found = collect([tmp_path])
    assert list(found.streams) == [HOSTILE[0]]
    assert "<script" not in markdown(found)
