"""Charts carry the hash of what they were drawn from, and draw what the rows say."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import charts

COMMON = {"precision": "int4", "batch": 1, "peak_mib": 100, "peer_peak_mib": 200}
DECODE = [
    COMMON | {"work": work, "peer": peer, "context": context, "metric": metric, "ours": ours, "theirs": theirs}
    for work, metric, contexts in (("prefill", "ms", (64, 640)), ("decode", "tokens/s", (128, 256, 640)))
    for context in contexts
    for peer, ours, theirs in (("llama.cpp", context + 1, context + 2), ("ort-genai", context + 1, context + 3))
]
ENCODER = [
    COMMON | {"peer": "torch", "context": size, "metric": "ms", "ours": ours, "theirs": 2 * ours}
    for size, ours in (("512x512", 200), ("256x1024", 210), ("1024x1024", 800))
]
FIRST = [
    COMMON | {"work": "load", "image": "", "peer": "torch", "ours": 1, "theirs": 2},
    COMMON | {"work": "first_token", "image": "new", "peer": "torch", "ours": 500, "theirs": 900}
    | {"encode_ms": 100, "peer_encode_ms": 300},
    COMMON | {"work": "first_token", "image": "held", "peer": "ours, the image new", "ours": 50, "theirs": 500}
    | {"encode_ms": 0, "peer_encode_ms": 100},
]  # fmt: skip
SERVE = [
    {"work": "sweep", "batch": batch, "rate": rate, "tokens_per_s": batch + rate, "first_p50_ms": 5, "first_p99_ms": 9}
    | {"gap_p50_ms": 1, "gap_p99_ms": 2}
    for batch in (8, 1)
    for rate in (0.2, 0.1)
] + [{"work": "seen", "ours": 1}]
ROWS = {"decode": DECODE, "encoder": ENCODER, "first_token": FIRST, "serve": SERVE}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "RESULTS", tmp_path)
    for name, rows in ROWS.items():
        content = {"machine": {"processor": "one", "cores": 2}, "date": "2026-01-01", "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_a_chart_is_outdated_once_its_file_changes(results):
    pictures = list(charts.outdated())
    assert [picture.name for picture in pictures] == [f"{name}.png" for name in charts.DRAWN]
    for picture in pictures:
        charts.draw(picture)
        assert Image.open(picture).width >= 800
    assert not list(charts.outdated())
    file = results / "encoder.json"
    file.write_text(file.read_text().replace("2026-01-01", "2026-01-02"))
    assert [picture.name for picture in charts.outdated()] == ["encoder.png"]


def test_lines_are_drawn_from_the_rows():
    figure = Figure()
    charts.draw_decode(DECODE, figure)
    prefill, contexts, batches = figure.axes[:3]
    drawn = {line.get_label(): list(line.get_ydata()) for line in prefill.lines}
    assert drawn == {"ours, int4": [65, 641], "llama.cpp, int4": [66, 642], "ort-genai, int4": [67, 643]}
    assert list(contexts.lines[0].get_xdata()) == [128, 640], "256 positions are the batches'"
    assert [list(line.get_xdata()) for line in batches.lines] == [[1], [1], [1]]
    assert (prefill.get_ylabel(), contexts.get_ylabel()) == ("ms", "tokens/s")


def test_sizes_are_drawn_by_their_pixels():
    figure = Figure()
    charts.draw_encoder(ENCODER, figure)
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert drawn["ours, square"] == [0.262144, 1.048576]
    assert drawn["torch, 1:4"] == [0.262144]


def test_bars_are_the_encoder_and_the_rest():
    figure = Figure()
    charts.draw_first_token(FIRST, figure)
    encode, rest = figure.axes[0].containers
    assert [bar.get_width() for bar in encode] == [100, 300, 0]
    assert [bar.get_width() for bar in rest] == [400, 600, 50]


def test_every_run_of_the_demo_model_has_its_curve():
    logs = {
        "one": [{"step": step, "loss": 1 / step, "told_apart": step / 4} for step in (1, 2, 3)],
        "two": [{"step": 10, "loss": 0.5}, {"step": 20, "loss": None}, {"step": 30, "loss": 0.25}],
    }
    figure = Figure()
    charts.draw_curves(logs, figure)
    one, two = figure.axes[:2]
    assert [axis.get_title() for axis in (one, two)] == ["one", "two"]
    assert list(one.lines[0].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(two.lines[0].get_xdata()) == [10, 30]
    assert list(figure.axes[-1].lines[0].get_ydata()) == [1 / 4, 2 / 4, 3 / 4]
    assert {log.stem for log in charts._logs()} >= {"stage0", "align", "figures_align"}


def test_rates_are_drawn_with_and_without_batching():
    figure = Figure()
    charts.draw_serve(SERVE, figure)
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    assert drawn == {"8 at once": ([0.1, 0.2], [8.1, 8.2]), "1 at once": ([0.1, 0.2], [1.1, 1.2])}
    assert [line.get_label() for line in figure.axes[1].lines][:2] == ["8 at once", "8 at once, 99 %"]
