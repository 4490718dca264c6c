"""A Comparison as one HTML file that needs nothing else: verdicts first, sortable tables, pictures as inline SVG.

Its numbers are those of `comparison.json`: a cell's `data-v` holds the number as it stands there, unrounded. A policy in
the head forbids every outside resource and every script but the page's own, which it knows by its sha256, so that a browser
would refuse another even where a word of a record were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.comparison.record import Comparison
from experiments.views.blocks import Block, blocks
from experiments.views.labels import plainly
from experiments.views.tables import MOST_UNTESTED, VERDICT, is_figure, parted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Colours of the pictures that must follow the page between light and dark.
THEMED = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--card)",
    "#6b6b6b": "var(--muted)",
    "#ececec": "var(--line)",
    "#b8b8b8": "var(--front)",
    # Colours of arms and of groups of joules that would drown in the dark.
    "#0072b2": "var(--blue)",
    "#009e73": "var(--green)",
    "#d55e00": "var(--red)",
    "#8a6d00": "var(--brown)",
    "#5c4b99": "var(--violet)",
    "#7a7a7a": "var(--grey)",
    "#00606b": "var(--teal)",
}

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f4;--card:#ffffff;--ink:#1b1b1b;--muted:#666;--line:#e2e2de;--accent:#0072b2;
--yes:#00704f;--no:#9a4b00;--front:#b8b8b8;
--blue:#0072b2;--green:#009e73;--red:#d55e00;--brown:#8a6d00;--violet:#5c4b99;--grey:#7a7a7a;--teal:#00606b}
@media (prefers-color-scheme:dark){:root{--page:#141516;--card:#1e2022;--ink:#e9e9e6;--muted:#a3a3a0;--line:#35383b;
--accent:#63b8ec;--yes:#4fd0a5;--no:#f0a860;--front:#6d7175;
--blue:#4aa8e6;--green:#2fc79a;--red:#f2853f;--brown:#c9a634;--violet:#a594e6;--grey:#9c9c9c;--teal:#3fb3c2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:92rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1.5rem 0 .5rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;margin:.75rem 0}
.card>h2,.card>h3{margin-top:.25rem}
.verdicts{list-style:none;padding:0;margin:0}.verdicts li{padding:.35rem 0;border-top:1px solid var(--line)}
.verdicts li:first-child{border:0}.yes{color:var(--yes);font-weight:700}.no{color:var(--no);font-weight:700}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,td.words,th.words{text-align:left}
td.long{white-space:normal;min-width:18rem}
th:first-child,td:first-child{position:sticky;left:0;background:var(--card)}
th button{all:unset;cursor:pointer;font-weight:600;color:var(--accent)}th button:focus-visible{outline:2px solid}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
.notes{color:var(--muted);font-size:.85rem;margin:.5rem 0 0;padding-left:1.1rem}
figure{margin:0}figure svg{display:block;width:100%;min-width:40rem;height:auto}
figure svg text{fill:var(--ink);font-family:system-ui,sans-serif}
summary{cursor:pointer;color:var(--accent);padding:.35rem 0}
figcaption,footer{color:var(--muted);font-size:.85rem}
code{font-size:.85em;overflow-wrap:anywhere}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const cell = row.cells[column];
      return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
    };
    const blank = value => typeof value === "string" && /^(-|not measured|)$/.test(value);
    const order = (a, b) => {
      if (blank(a) || blank(b)) return blank(a) - blank(b);
      const sign = typeof a === "number" && typeof b === "number" ? a - b
        : String(a).localeCompare(String(b), undefined, {numeric: true});
      return up ? sign : -sign;
    };
    const body = table.tBodies[0];
    [...body.rows].map(row => [key(row), row]).sort((a, b) => order(a[0], b[0])).forEach(([, row]) => body.append(row));
  }));
}
"""

POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    + "'"
)


def page(comparison: Comparison, document: Mapping[str, Any], pictures: Mapping[str, Figure]) -> str:
    """The HTML text. `document` is the content of comparison.json; `pictures`: caption -> figure."""
    found = blocks(comparison)
    head = [block for block in found if block.meanings]
    rest = [block for block in found if not block.meanings]
    drawn = [picture(figure, caption, i) for i, (caption, figure) in enumerate(pictures.items())]
    count = sum(row["n"] for row in document["table"] if row["kind"] == "arm")
    deployed = len(document["deployments"])
    parts = [
        f"<h1>Comparison: {html.escape(', '.join(comparison.streams))}</h1>",
        f"<p>{count} training run{_s(count)}, {deployed} deployed model{_s(deployed)}, {len(document['excluded'])} left"
        " out. Loss is held-out nats per token, lower is better.</p>",
        *_verdicts(document["verdicts"]),
        *map(table, head),
        *drawn,
        *map(table, rest),
        *_excluded(document["excluded"]),
        _folders(comparison),
        "<footer><p>A joule is counted and modelled, extrapolated, or measured, and says so; the three share no column. "
        "&gt;= marks a sum with a part missing, and what is missing is named. Hypothetical: a constant used outside its "
        "domain. The same numbers, unrounded: <code>comparison.json</code> beside this file.</p></footer>",
    ]
    return shell("Comparison", parts)


def shell(title: str, parts: Sequence[str]) -> str:
    """Parts of a body as a page that needs nothing else: the policy, style and the script that sorts its tables."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _verdicts(sentences: Sequence[str]) -> list[str]:
    """What was tested first; where much was not, that is folded away."""
    tested, untested = parted(sentences)
    folded = len(untested) > MOST_UNTESTED
    shown, hidden = (tested, untested) if folded else (list(sentences), [])
    parts = ['<section class="card" id="verdicts"><h2>Verdicts</h2>']
    parts.append(f'<ul class="verdicts">{"".join(map(_verdict, shown))}</ul>' if shown else "")
    if hidden:
        head = f"{len(hidden)} differences without a test: one seed each, or not comparable"
        parts.append(
            f'<details><summary>{head}</summary><ul class="verdicts">{"".join(map(_verdict, hidden))}</ul></details>'
        )
    return [*parts, "</section>"]


def _verdict(sentence: str) -> str:
    """yes and no are verdicts where a reason follows; "no test possible" and "no verdict" are none."""
    return f"<li>{re.sub(VERDICT, _coloured, html.escape(sentence))}</li>"


def _coloured(found: re.Match[str]) -> str:
    return f': <span class="{found[1]}">{found[1]}</span>'


def table(block: Block) -> str:
    """A block as a card with a table that can be sorted."""
    words = [all(not _numeric(row[i]) for row in block.rows) for i in range(len(block.header))]
    meanings = block.meanings or [""] * len(block.header)
    heads = []
    for name, meaning, flush in zip(block.header, meanings, words, strict=True):
        title = f' title="{html.escape(meaning)}"' if meaning else ""
        heads.append(f'<th scope="col"{_class(flush, "")}{title}><button type="button">{html.escape(name)}</button></th>')
    lines = []
    for number, row in enumerate(block.rows):
        raw: Sequence[Any] = block.raw[number] if block.raw else [None] * len(row)
        cells = zip(row, raw, words, strict=True)
        lines.append("<tr>" + "".join(_cell(text, value, flush) for text, value, flush in cells) + "</tr>")
    level = min(3, block.level)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in block.notes)
    return (
        f'<section class="card"><h{level}>{html.escape(block.title)}</h{level}><div class="wide"><table>'
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</section>"
    )


def _cell(text: str, value: Any, flush: bool) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    data = f' data-v="{json.dumps(value)}"' if number else ""
    return f"<td{_class(flush, text)}{data}>{html.escape(text)}</td>"


def _class(flush: bool, text: str) -> str:
    names = [*(["words"] if flush else []), *(["long"] if len(text) > 60 else [])]
    return f' class="{" ".join(names)}"' if names else ""


def _numeric(cell: str) -> bool:
    return is_figure(cell) or cell in ("-", "not measured")


def _excluded(excluded: Iterable[Mapping[str, str]]) -> list[str]:
    items = [f"<li><code>{html.escape(x['folder'])}</code>: {html.escape(x['reason'])}</li>" for x in excluded]
    return [f'<section class="card" id="left-out"><h2>Left out</h2><ul>{"".join(items)}</ul></section>'] if items else []


def _folders(comparison: Comparison) -> str:
    """Which folder each row comes from; run.json there has command, versions and commit."""
    found: list[tuple[str, str]] = []
    for stream in comparison.streams.values():
        found += [(f"{stream.name}, {arm.name}", run.folder) for arm in stream.arms.values() for run in arm.runs]
        found += [(f"{stream.name}, {group.label}", item.folder) for group in stream.deployed for item in group.items]
    rows = [f"<li>{html.escape(name)}: <code>{html.escape(folder)}</code></li>" for name, folder in found]
    head = "Folders of the runs; run.json in each has command, versions and commit"
    return (
        f'<section class="card" id="folders"><details><summary>{head}</summary><ul>{"".join(rows)}</ul></details></section>'
    )


def picture(figure: Figure, caption: str, number: int) -> str:
    """A figure and its caption as a card; `number` tells pictures of one page apart."""
    drawn = inline_svg(plainly(figure), f"p{number}")
    said = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<section class="card"><figure><div class="wide">{drawn}</div>{said}</figure></section>'


def inline_svg(figure: Figure, prefix: str) -> str:
    """A figure as an SVG element for HTML: names of its own (`prefix`), no namespaces, no metadata, text as text, and
    the neutral colours as the page's variables."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\sid="', f' id="{prefix}-', text)
    text = text.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    widest = round(1.35 * 96 * figure.get_figwidth())
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', rf'\1 style="max-width:{widest}px"', text, count=1)
    for colour, variable in THEMED.items():
        text = re.sub(rf"(fill|stroke): {colour}", rf"\1: {variable}", text)
    return text.strip()


def _s(count: int) -> str:
    return "" if count == 1 else "s"
