"""All tables and figures on one HTML page that needs no network.

    python -m experiments.paper.page --scale tiny --output outputs/tiny/results

renders every item into the folder and writes index.html, with the images inside it.
"""

import argparse
import base64
import json
import re
from html import escape
from pathlib import Path

from experiments.paper import numbers, plan, tables
from experiments.paper.captions import caption, not_the_papers
from experiments.paper.layout import LAYOUTS
from experiments.paper.render import Rendered, checked
from experiments.paper.results import missing
from pte_trl.runtime.manifest import environment

CSS = """
:root { color-scheme: light dark; --line: #8884; --loud: #b00020; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --loud: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; }
th, td { padding: .2rem .6rem .2rem 0; text-align: left; font-variant-numeric: tabular-nums; }
thead th { border-bottom: 2px solid var(--line); } tr.paper td { border-top: 1px solid var(--line); }
tr.ours td { font-weight: 600; } tr.clean td, tr.diff td { opacity: .75; }
tr.n td { border-top: 1px solid var(--line); font-size: .8rem; opacity: .75; } td.slip { background: var(--soft); }
.loud { border: 2px solid var(--loud); color: var(--loud); padding: .5rem 1rem; font-weight: 600; }
table.overview td:last-child { white-space: normal; }
img { max-width: 100%; min-width: 44rem; height: auto; background: white; } pre { overflow-x: auto; font-size: .8rem; }
sup { line-height: 0; } summary { cursor: pointer; } .notes, footer { font-size: .9rem; }
"""


def html(rendered: list[Rendered], scale: str) -> str:
    """The page. Items with a number of ours come first; the others are listed, folded up."""
    stand_in, ready = plan.stand_in(scale), [one for one in rendered if one.started]
    waiting = [one for one in rendered if not one.started]
    about = " | ".join(f"{key} {value}" for key, value in environment().items())
    body = ["<h1>Progressive Thought Encoding: the paper beside ours</h1>"]
    if stand_in:
        body.append(f'<p class="loud">{escape(not_the_papers(stand_in))}</p>')
    body += [
        f"<p>Scale: {escape(scale)}. Paper: arXiv 2602.16839, version 1. "
        "The paper contradicts itself about numbers with a shaded background; the notes say how.</p>",
        _overview(rendered),
        *(_item(one, stand_in) for one in ready),
        "<h2>Not there yet</h2>" if waiting else "",
        *(f"<details><summary>{_title(one)}</summary>{_item(one, stand_in)}</details>" for one in waiting),
        "<h2>The paper's text</h2><p>Slips that touch no number above:</p>",
        _list(text for text in numbers.general_slips() if text not in _shown(rendered)),
        f"<footer><p>{escape(about)}</p></footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pte_trl: paper beside ours ({escape(scale)})</title><style>{CSS}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _title(one: Rendered) -> str:
    return escape(LAYOUTS[one.item].title)


def _shown(rendered: list[Rendered]) -> set[str]:
    return {text for one in rendered for text in numbers.general_slips(one.item)}


def _overview(rendered: list[Rendered]) -> str:
    """Every item, how much of it is there, and how many of the paper's numbers are slips."""
    lines = []
    for one in rendered:
        there, slips = len(one.rows) - len(missing(one.rows)), sum(bool(row.slips) for row in one.rows)
        name = f'<a href="#{one.item}">{_title(one)}</a>'
        lines.append(f"<tr><td>{there} of {len(one.rows)}</td><td>{slips or ''}</td><td>{name}</td></tr>")
    head = "<tr><th>ours there</th><th>slips</th><th>item</th></tr>"
    return (
        f'<div class="wide"><table class="overview"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _item(one: Rendered, stand_in: dict) -> str:
    head = f'<h2 id="{one.item}">{_title(one)}</h2>'
    loud, *rest = [f"<p>{escape(text)}</p>" for text in caption(one.item, one.rows, stand_in)]
    captions = "".join([loud.replace("<p>", '<p class="loud">') if stand_in else loud, *rest])
    cells = "".join(_table(one.item, section) for section in tables.sections(one.item, one.rows))
    if one.shown.suffix == ".png":
        image = base64.b64encode(one.shown.read_bytes()).decode()
        picture = f'<img alt="{_title(one)}" src="data:image/png;base64,{image}">'
        cells = f'<div class="wide">{picture}</div><details><summary>The numbers</summary>{cells}</details>'
    manifest = escape(json.dumps(one.manifest, indent=1))
    made_from = f"<details><summary>What it was made from</summary><pre>{manifest}</pre></details>"
    return f'{head}{captions}{cells}<div class="notes">{_notes(one)}{made_from}</div>'


def _notes(one: Rendered) -> str:
    """The lists below a table; a cell's mark [n] links to the n-th slip."""
    slips = tables.footnotes(one.rows)
    ids = {text: f' id="{one.item}-{n}"' for n, text in enumerate(slips, 1)}
    marks = {text: f"[{n}] " for n, text in enumerate(slips, 1)}
    out = ""
    for heading, texts in tables.lists(one.deviations, slips, numbers.general_slips(one.item)):
        lines = (f"<li{ids.get(text, '')}>{marks.get(text, '')}{escape(text)}</li>" for text in texts)
        out += f"<p>{escape(heading)}:</p><ul>{''.join(lines)}</ul>"
    return out


def _list(texts) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _table(item: str, section: tables.Section) -> str:
    """A section as an HTML table; the kind of a line is in the column whose header is empty."""
    kind = section.header.index("")
    head = "".join(f"<th>{escape(text)}</th>" for text in section.header)
    lines = [f'<tr class="{line[kind]}">{"".join(_cell(item, text) for text in line)}</tr>' for line in section.lines]
    title = f"<h3>{escape(section.title)}</h3>" if section.title else ""
    return (
        f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _cell(item: str, text: str) -> str:
    marked = re.sub(r"\[(\d+)\]", rf'<sup><a href="#{item}-\1">\1</a></sup>', escape(text))
    return f'<td class="slip">{marked}</td>' if marked != escape(text) else f"<td>{marked}</td>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="paper")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rendered = [checked(item, args.scale, args.output) for item in plan.ITEMS]
    path = args.output / "index.html"
    path.write_text(html(rendered, args.scale), encoding="utf-8")
    absent = sum(len(missing(one.rows)) for one in rendered)
    print(f"{path}: {absent} of {sum(len(one.rows) for one in rendered)} numbers missing")


if __name__ == "__main__":
    main()
