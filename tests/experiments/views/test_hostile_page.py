"""Names, settings and texts that try to run a script or to load something, in a real headless Chromium: our page and
TensorBoard show them as words.

A small server of the test's own is what the payloads would reach; it counts what was asked of it. Our page is looked at
with its policy and without it, so that the escapes hold alone; a page with nothing escaped shows that the policy holds
alone too, and one with neither that the payloads are real.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.compare import CompareConfig, compare
from experiments.views.page import shell
from tests.environments import missing
from tests.experiments.comparison.records import arm_record, deployed_record
from tests.experiments.console import spikegate

spec = importlib.util.spec_from_file_location("experiments_browser_hostile", Path(__file__).with_name("browser.py"))
assert spec is not None
browser = importlib.util.module_from_spec(spec)
sys.modules["experiments_browser_hostile"] = browser
assert spec.loader is not None
spec.loader.exec_module(browser)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:constrained_layout not applied"),  # ten arms with long names leave a panel no room
]
LIMIT_S = 240.0
SETTLE_S = 3.0
"""A page that loads something begins to within milliseconds of being shown."""
MARK = "hostile"
PRESS = "[...document.querySelectorAll('th')].find(h => h.textContent === 'loss nats').querySelector('button').click()"
FOREIGN = "document.querySelectorAll('img, iframe, object, link, base, input, a, [onload], [onerror], [ontoggle]').length"


class Canary:
    """A server that must never be asked for anything."""

    def __init__(self) -> None:
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *given: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Canary:
        return self

    def __exit__(self, *raised: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def payloads(self) -> list[str]:
        """Each would leave a mark: a request, or `window.ran`."""
        call = "window.ran=1"
        return [
            f"{MARK}<script>{call}</script>",
            f'{MARK}"><img src={self.address}/img onerror={call}>',
            f"{MARK}'><svg onload={call}><image href='{self.address}/svg'/></svg>",
            f"{MARK}</script><script src={self.address}/script></script>",
            f"{MARK}</title></style><style>@import '{self.address}/css';</style>",
            f"{MARK}![picture]({self.address}/markdown.png) <iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
            f"{MARK}`|\n\n![picture]({self.address}/broken-out.png)\n\n<img src={self.address}/html>",
            f"{MARK}<object data={self.address}/object></object><link rel=stylesheet href={self.address}/link>",
            f"{MARK}$\\text{{x}}$<meta http-equiv=refresh content='0;url={self.address}/refresh'><base href=/x/>",
            f"{MARK}<details open ontoggle={call}><input autofocus onfocus={call}><a href='javascript:{call}'>x</a>",
        ]


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with Canary() as made:
        yield made


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = browser.find()
    if program is None:
        missing("chromium", "no Chromium on the path (apt-get install chromium), and SPIKEGATE_CHROMIUM names none")
    with browser.Browser(str(program), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def shown(canary: Canary, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was really trained under such names, records with all of them everywhere, and their comparison."""
    top = tmp_path_factory.mktemp("hostile")
    payloads = canary.payloads()
    for number, name in enumerate(payloads):
        run = top / f"r{number}"
        run.mkdir()
        info = {"schema": 1, "kind": "train", "status": "finished", "stream": payloads[0], "arm": name, "seed": 0}
        (run / "run.json").write_text(
            json.dumps(info | {"command": name, "versions": {name: name}, "git": {"commit": name}})
        )
        (run / "result.json").write_text(json.dumps(arm_record(1.7 + number / 100, notes=[name])))
        (run / "config.yaml").write_text(yaml.safe_dump({"optim": {"lr": name}, "gate": {"name": name, "signal": name}}))
        points = [{"step": i, "reference_s": 2.0 * i, "val_loss_nats": 3.0 / (1 + i)} for i in range(4)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (top / "deploy").mkdir()
    info = {"schema": 1, "kind": "deploy", "status": "finished", "stream": payloads[0], "arm": payloads[1], "seed": 0}
    (top / "deploy" / "run.json").write_text(json.dumps(info))
    record = deployed_record(ran_on=payloads[2], arm=payloads[1])
    (top / "deploy" / "deploy.json").write_text(json.dumps(record))
    small = [
        "model.width=16", "model.layers=1", "model.heads=2", "model.context=32", "trainer.batch_windows=4", "data=files",
        "trainer.eval_tokens=2048", "trainer.evaluations=1", f"data.path={text}", "trainer.budget_offered_tokens=1024",
        f"stream='{payloads[0]}'", f"arm='{MARK}<img src=x onerror=window.ran=1>'",
    ]  # fmt: skip
    spikegate("train", *small, f"run='{MARK}<b onclick=x>'", cwd=top)
    compare(CompareConfig(folder=str(top), out=str(top / "comparison")))
    return top


def quiet(tab: Any, canary: Canary) -> None:
    """Neither a mark in the page nor a request, some time after it was shown."""
    time.sleep(SETTLE_S)
    assert tab.evaluate("typeof window.ran") == "undefined"
    assert canary.asked == []


@pytest.mark.parametrize("heed_policy", [True, False], ids=["with its policy", "without its policy"])
def test_the_page_runs_and_loads_nothing(heed_policy: bool, shown: Path, window: Any, canary: Canary) -> None:
    tab = window.open((shown / "comparison" / "comparison.html").as_uri(), heed_policy=heed_policy)
    tab.until(
        "Comparison: ", f"{MARK}<script>window.ran=1</script>", "</title></style>", "onerror=window.ran=1", limit_s=LIMIT_S
    )
    quiet(tab, canary)
    assert tab.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert tab.evaluate(FOREIGN) == 0
    assert tab.evaluate("document.scripts.length") == 1
    first = "document.querySelector('table').tBodies[0].rows[0].cells[0].textContent"
    before = tab.evaluate(first)  # its own script runs, under its policy: a table sorts
    tab.evaluate(PRESS)
    tab.evaluate(PRESS)
    assert tab.evaluate(first) != before


def test_the_policy_alone_refuses_what_is_not_escaped_and_without_either_it_happens(window: Any, tmp_path: Path) -> None:
    """On a server of its own: the page without a policy goes on asking for things while other tests look."""
    with Canary() as canary:
        harmless = [
            text for text in canary.payloads() if "refresh" not in text
        ]  # leaving the page, which no policy forbids
        page = tmp_path / "raw.html"
        page.write_text(shell("raw", harmless), encoding="utf-8")
        tab = window.open(page.as_uri())
        tab.until(MARK, limit_s=LIMIT_S)
        quiet(tab, canary)
        bare = tmp_path / "bare.html"
        bare.write_text(re.sub(r"<meta http-equiv=\"Content.*?>", "", page.read_text(), count=1), encoding="utf-8")
        tab = window.open(bare.as_uri())
        deadline = time.monotonic() + LIMIT_S
        while (
            not {"/img", "/svg", "/script", "/css"} <= set(canary.asked) or tab.evaluate("typeof window.ran") == "undefined"
        ):
            assert time.monotonic() < deadline, canary.asked
            time.sleep(0.2)


@pytest.fixture(scope="module")
def tensorboard(shown: Path) -> Iterator[str]:
    words = [sys.executable, "-m", "tensorboard.main", f"--logdir={shown}", "--port=0", "--load_fast=false"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        said: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)
        reader.start()
        deadline = time.monotonic() + LIMIT_S
        while not (found := re.search(r"at (http://\S+)", "".join(said))) and process.poll() is None:
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        try:
            assert found is not None, said
            yield found[1].rstrip("/")
        finally:
            process.terminate()
            process.wait(30)
            reader.join(30)


@pytest.mark.parametrize("heed_policy", [True, False], ids=["with its policy", "without its policy"])
def test_tensorboard_runs_and_loads_nothing_of_ours(
    heed_policy: bool, tensorboard: str, window: Any, canary: Canary
) -> None:
    """Its texts are Markdown that it makes HTML of, pictures included; its names of runs are ours."""
    tab = window.open(f"{tensorboard}/#text", heed_policy=heed_policy)
    tab.until("config", f"{MARK}<b onclick=x>", limit_s=LIMIT_S)
    for heading in ("comparison", "config", "energy per token"):
        tab.press(heading)
    tab.until("window.ran=1", limit_s=LIMIT_S)
    quiet(tab, canary)
    tab = window.open(f"{tensorboard}/#hparams", heed_policy=heed_policy)
    tab.until(MARK, limit_s=LIMIT_S)
    quiet(tab, canary)
