"""Figures from runs written by hand: what is drawn where; then files, manifests and the page."""

import base64
import csv
import json
from html.parser import HTMLParser
from math import isnan

import pytest

from experiments.paper import figures, page, plan, render, results
from experiments.paper.plan import Cell
from tests.paper_runs import MATH, MODEL, STAND_IN, evaluation, table1_cells, write_evaluation, write_table1_runs

PNG = b"\x89PNG\r\n\x1a\n"


def window_cells(root, budgets):
    """Figure 4b: PTE at the paper's windows under budgets of ours, 37.5 % where a run is there."""
    return [
        Cell({"strategy": "pte_sliding_window", "window": x}, evaluation(root / x, budget=budget), "pass@1")
        for x, budget in budgets.items()
    ]


def curves(axis):
    """(dashed, solid) lines of a panel as lists of y, nan where nothing is drawn."""
    lines = [line for line in axis.get_lines() if line.get_linestyle() in ("-", "--") and len(line.get_xdata()) > 1]
    dashed = [list(line.get_ydata()) for line in lines if line.get_linestyle() == "--"]
    return dashed, [list(line.get_ydata()) for line in lines if line.get_linestyle() == "-"]


def test_ours_is_drawn_at_the_papers_windows_and_missing_points_are_left_out(tmp_path):
    for window in ("768", "1536"):
        write_evaluation(tmp_path / window, MATH)
    found = results.rows("figure4b", window_cells(tmp_path, {"768": 40, "1024": 48, "1536": 64}))
    (axis,) = figures.figure("figure4b", found, {}).axes
    (paper,), (ours,) = curves(axis)
    assert paper == [48.4, 50.4, 54.0]
    assert ours[::2] == [37.5, 37.5] and isnan(ours[1])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["768\n(40)", "1024\n(48)", "1536\n(64)"]
    (bars,) = axis.collections  # the error bars
    low, high = bars.get_segments()[0][:, 1]
    assert (low + high) / 2 == pytest.approx(37.5) and (high - low) / 2 == pytest.approx(23.9357, abs=1e-4)


def test_ticks_name_one_budget_where_ours_is_the_papers(tmp_path):
    found = results.rows("figure4b", window_cells(tmp_path, {"768": 768, "1024": 1024}))
    (axis,) = figures.figure("figure4b", found, {}).axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["768", "1024"]


def test_the_papers_curve_is_broken_where_the_paper_has_no_point():
    found = results.rows("figure4a", plan.cells("figure4a", "paper"))
    (axis,) = figures.figure("figure4a", found, {}).axes
    dashed, solid = curves(axis)
    assert len(dashed) == 7 and sum(isnan(y) for line in dashed for y in line) == 1
    assert all(isnan(y) for line in solid for y in line)


def test_figure_5_has_a_logarithmic_axis_of_lengths(tmp_path):
    keys = [{"method": "pte", "max_generation_length": str(x)} for x in (3072, 6144)]
    cells = [Cell(k, evaluation(tmp_path, 1024, int(k["max_generation_length"]) // 32), "pass@1") for k in keys]
    (axis,) = figures.figure("figure5", results.rows("figure5", cells), {}).axes
    assert axis.get_xscale() == "log" and list(axis.get_xticks()) == [3072, 6144]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["3K\n(96)", "6K\n(192)"]


@pytest.mark.parametrize("item, panels", {"figure3": 10, "figureA1": 5, "figure4a": 1, "figure6": 4}.items())
def test_panels(item, panels):
    drawn = figures.figure(item, results.rows(item, plan.cells(item, "paper")), {})
    assert len(drawn.axes) == panels
    titles = [axis.get_title() for axis in drawn.axes]
    assert len(set(titles)) == panels


def test_the_two_rows_of_figure_3_show_their_own_numbers():
    drawn = figures.figure("figure3", results.rows("figure3", plan.cells("figure3", "paper")), {})
    first = {axis.get_title(): curves(axis)[0][3][0] for axis in drawn.axes}  # PTE at window 768
    assert (first["3a MATH-500"], first["3b MATH-500"]) == (55.2, 49.8)


def test_pte_has_one_colour_in_all_figures_and_no_two_curves_share_one():
    for item in ("figure3", "figure4a", "figure4b", "figure5", "figureA1"):
        looks = figures.styles(item, results.rows(item, plan.cells(item, "paper")))
        assert len(set(looks.values())) == len(looks)
        itself = {"figure4a": "global_32", "figure4b": "pte_sliding_window"}.get(item, "pte")
        assert looks[itself] == ("#D55E00", "o")


def test_a_table_is_no_figure():
    with pytest.raises(ValueError, match="table1 is no figure"):
        figures.figure("table1", [], {})


def test_figure_6_counts_correct_responses_in_bins_of_their_tokens(tmp_path):
    # Width 3, so bins [3, 6), [6, 9), ..., [24, inf); wrong responses do not count.
    write_evaluation(tmp_path, [[1, 1], [1, 1], [1, 0]], tokens=[[3, 5], [6, 17], [18, 90]])
    found = results.rows("figure6", [Cell({"method": "pte"}, evaluation(tmp_path), "lengths")], bin_width=3)
    ours = {row.keys["bin"]: row.ours for row in found}
    expected = {"1.0-2.0": 40, "2.0-3.0": 20, "5.0-6.0": 20, "6.0-7.0": 20, "long": 20}
    assert ours == {name: pytest.approx(expected.get(name, 0)) for name in ours} and len(ours) == 9
    assert {row.samples for row in found} == {5}
    first, *_, long = found
    assert first.paper == pytest.approx(6.8966) and long.paper == 19.0
    assert first.se == pytest.approx(100 * (0.4 * 0.6 / 5) ** 0.5)
    (axis, *_) = figures.figure("figure6", found, STAND_IN).axes
    assert [bar.get_height() for bar in axis.patches[:8]] == [pytest.approx(ours[name]) for name in list(ours)[:8]]
    assert "ours 20.0 % (1 of 5)" in axis.texts[0].get_text() and "paper 19.0 %" in axis.texts[0].get_text()


def test_figure_6_shows_responses_below_the_papers_first_bin(tmp_path):
    write_evaluation(tmp_path, [[1, 1]], tokens=[[99, 100]])
    found = results.rows("figure6", [Cell({"method": "pte"}, evaluation(tmp_path), "lengths")])
    assert [(row.keys["bin"], row.ours) for row in found[:2]] == [("0.0-1.0", 50.0), ("1.0-2.0", 50.0)]
    assert sum(row.ours for row in found if row.keys["bin"] != "long") == 100.0


@pytest.fixture
def plan_of_table1(tmp_path, monkeypatch):
    """A plan with the runs of table 1 written by hand, two points of figure 4b, and nothing else done."""
    write_table1_runs(tmp_path / "runs")
    write_evaluation(tmp_path / "runs" / "768", MATH)
    whole = plan.cells
    cells = {
        "table1": table1_cells(tmp_path / "runs"),
        "figure4b": window_cells(tmp_path / "runs", {"768": 40, "1024": 48}),
    }
    monkeypatch.setattr(plan, "cells", lambda item, scale: cells.get(item) or whole(item, scale))
    monkeypatch.setattr(plan, "stand_in", lambda scale: STAND_IN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_is_written_with_its_csv_and_manifest(plan_of_table1):
    render.render("table1", "tiny", plan_of_table1 / "out")
    assert "37.5 ±23.9" in (plan_of_table1 / "out" / "table1.md").read_text()
    manifest = json.loads((plan_of_table1 / "out" / "table1.json").read_text())
    runs = {folder.rpartition("runs/")[2]: run for folder, run in manifest["runs"].items()}
    assert runs["pte/math500"] == {"commit": "c0ffee", "seed": 7} and runs["train"]["seed"] == 42
    assert [folder.rpartition("runs/")[2] for folder in manifest["runs_missing"]] == ["baseline/aime24"]
    assert [keys["metric"] for keys in manifest["missing"]] == ["aime24_pass16", "avg"]
    assert {"commit", "date", "hardware", "versions"} <= set(manifest)


def test_a_figure_is_a_png_with_the_csv_behind_it(plan_of_table1):
    rendered = render.render("figure4b", "tiny", plan_of_table1 / "out")
    assert rendered.shown.name == "figure4b.png" and rendered.shown.read_bytes().startswith(PNG)
    with rendered.table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["window"], line["at"], line["ours"]) for line in lines] == [
        ("768", "40", "37.5"),
        ("1024", "48", ""),
    ]


def test_the_command_prints_the_table_and_what_is_missing(plan_of_table1, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["render", "table1", "figure4b", "--scale", "tiny", "--output", "out"])
    render.main()
    printed = capsys.readouterr().out
    assert "37.5 ±23.9" in printed and "table1: 2 of 7 numbers missing" in printed
    assert "out/figure4b.png" in printed and "figure4b: 1 of 2 numbers missing" in printed


class Reader(HTMLParser):
    """Collects what a page refers to, its ids and text, and complains about tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.links, self.ids, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[key] for key in ("src", "srcset", "data", "poster", "action") if key in attrs]
        self.links += [attrs["href"]] if "href" in attrs else []
        self.ids += [attrs["id"]] if "id" in attrs else []
        assert tag not in ("script", "link", "iframe")
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(plan_of_table1, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["page", "--scale", "tiny", "--output", "out"])
    page.main()
    text = (plan_of_table1 / "out" / "index.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and len(reader.ids) == len(set(reader.ids))
    assert len(reader.sources) == 6 and all(src.startswith("data:image/png;base64,") for src in reader.sources)
    assert all(base64.b64decode(src.partition(",")[2]).startswith(PNG) for src in reader.sources)
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    assert "url(" not in text and "@import" not in text
    assert "a <small> model. Its numbers & the paper's differ." in reader.text  # escaped in the source
    assert "37.5 ±23.9" in reader.text and "c0ffee" in reader.text
    assert set(plan.ITEMS) <= set(reader.ids)
    # Done first: table 1 and figure 4b have numbers of ours, the others wait under a heading.
    assert text.index('<h2 id="figure4b">') < text.index("Not there yet") < text.index('<h2 id="table2">')
    assert "index.html: " in capsys.readouterr().out


def test_slips_on_the_page_link_to_their_notes(plan_of_table1):
    text = page.html([render.render("tableA1", "paper", plan_of_table1 / "out")], "paper")
    assert '<td class="slip">50.8 <sup><a href="#tableA1-1">1</a></sup></td>' in text
    assert '<li id="tableA1-1">[1] Figures 4a, 4b and A1 have 50.4' in text


def test_error_bars_are_the_interval_where_all_is_right(tmp_path):
    write_evaluation(tmp_path / "768", [[1, 1]] * 4)
    found = results.rows("figure4b", window_cells(tmp_path, {"768": 40}))
    (axis,) = figures.figure("figure4b", found, {}).axes
    (bars,) = axis.collections
    assert list(bars.get_segments()[0][:, 1]) == pytest.approx([51.01, 100.0], abs=0.01)


def test_figure_6_counts_the_responses_of_all_seeds(tmp_path):
    write_evaluation(tmp_path / "a", [[1, 1]], tokens=[[3, 5]])
    write_evaluation(tmp_path / "b", [[1, 0]], tokens=[[7, 5]])
    cells = [Cell({"method": "pte"}, evaluation(tmp_path / name), "lengths") for name in ("a", "b")]
    found = results.rows("figure6", cells, bin_width=3)
    assert [(row.keys["bin"], row.samples) for row in found if row.ours and row.ours > 50] == [("1.0-2.0", 3)]


def test_an_unknown_scale_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*hourly"):
        render.checked("table1", "hourly", tmp_path)


def test_the_deviations_are_below_the_table_on_the_page_and_in_the_manifest(plan_of_table1):
    rendered = render.render("table1", "tiny", plan_of_table1 / "out")
    text, markdown = page.html([rendered], "tiny"), rendered.shown.read_text()
    manifest = json.loads((plan_of_table1 / "out" / "table1.json").read_text())
    assert manifest["deviations"] == rendered.deviations != []
    assert "Deviations from the paper:\n\n- Model: a <small> model.\n" in markdown
    assert "<p>Deviations from the paper:</p><ul><li>Model: a &lt;small&gt; model.</li>" in text
    assert '<tr class="n">' in text and "4 x 2" in text


def test_the_page_has_the_differences(plan_of_table1, monkeypatch):
    write_evaluation(plan_of_table1 / "runs" / "lora_c", [[1, 0], [0, 0], [0, 0], [0, 0]])
    keys = {"model": MODEL, "method": "lora_c", "metric": "math500"}
    cells = [*plan.cells("table1", "tiny"), Cell(keys, evaluation(plan_of_table1 / "runs" / "lora_c"), "pass@1")]
    monkeypatch.setattr(plan, "cells", lambda item, scale: cells)
    text = page.html([render.render("table1", "tiny", plan_of_table1 / "out")], "tiny")
    assert "PTE minus the others, paired by problem</h3>" in text and "<td>+25.0 ±14.4</td>" in text
