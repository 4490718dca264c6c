"""What a deployment leaves for people in its folder: `deployment.html`, and TensorBoard's events."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.views.chip_figure import chip_figure
from experiments.views.page import picture, shell, table
from experiments.views.rasters import raster_figure
from experiments.views.samples.pictures import confusion_figure, values_figure
from experiments.views.samples.tables import blocks_of, markdown
from experiments.views.tracking import Tracker
from hardware.markdown import fenced
from hardware.placement import Placement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "deployment.html"
SCALARS = ("mapped_mac_share", "events_per_sample", "synops_per_sample", "synops_fraction", "cores", "clipped_inputs")
LAYOUT = {"deployment": {"float, quantised, simulated": ["Multiline", ["deploy/"]]}}


def write_views(
    folder: Path,
    document: Mapping[str, Any],
    config: str,
    *,
    data: NDArray[np.generic],
    answers: Mapping[str, NDArray[np.generic]],
    placement: Placement | None,
    messages: Mapping[str, Any],
) -> None:
    """Write the page and the events.

    Args:
        folder: of the deployment; no events in it yet.
        document: content of `deploy.json`.
        config: the settings as YAML.
        data: the first held-out sample's answer, for values.
        answers: model -> its answer to that sample.
        placement: on cores, None where it does not fit.
        messages: population -> messages (batch, steps, neurons).
    """
    drawn = _pictures(document, data, answers, placement, messages)
    parts = [
        f"<h1>{html.escape(document['model'])} on {html.escape(document['data'])}</h1>",
        f"<p>{html.escape(document['route'])} route, {html.escape(document['chip'])}; counts are of the simulator, "
        "joules, cores and times are modelled.</p>",
    ]
    first, *rest = blocks_of(document)
    parts += [table(first), *(picture(fig, caption, i) for i, (caption, fig) in enumerate(drawn.items()))]
    parts += [*map(table, rest)]
    for name in ("compatibility", "conversion"):
        shown = f'<div class="wide"><pre>{html.escape(document[name])}</pre></div>'
        parts.append(f'<section class="card"><h2>{name}</h2>{shown}</section>')
    parts.append(f'<section class="card"><h2>settings</h2><pre>{html.escape(config)}</pre></section>')
    parts.append("<footer><p>The same numbers, unrounded: <code>deploy.json</code> beside this file.</p></footer>")
    (folder / PAGE).write_text(shell(f"{document['model']} on {document['data']}", parts), encoding="utf-8")
    metric = document["metric"]
    with Tracker(folder, layout=LAYOUT) as tracker:
        values = {f"deploy/{metric}_{name}": found["value"] for name, found in document[metric].items()}
        tracker.log(1, values | {f"deploy/{name}": document[name] for name in SCALARS})
        for block in blocks_of(document):
            tracker.text(block.title.split(",")[0], markdown(block))
        for name in ("compatibility", "conversion"):
            tracker.text(name, fenced(document[name]))
        tracker.text("config", fenced(config, "yaml"))
        for caption, figure in drawn.items():
            tracker.figure(caption.split(":")[0], figure)


def _pictures(
    document: Mapping[str, Any],
    data: NDArray[np.generic],
    answers: Mapping[str, NDArray[np.generic]],
    placement: Placement | None,
    messages: Mapping[str, Any],
) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    matrices = {name: rows for name, rows in document["confusion"].items() if rows}
    if matrices:
        found["confusion: true class against the class answered"] = confusion_figure(matrices)
    elif document["metric"] == "nrmse":
        found["values: the first held-out sample"] = values_figure(data, answers)
    if messages:
        title = f"messages on held-out samples, {document['route']} route"
        found["spike raster: messages of the first samples"] = raster_figure(messages, title)
    if placement is not None:
        found["core utilisation: cores of the chip"] = chip_figure(placement)
    return found
