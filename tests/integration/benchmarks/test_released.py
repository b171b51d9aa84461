"""The comparison at the released size, on workers that take known times."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.peers.products import Cost
from benchmarks.released import __main__ as command
from benchmarks.released import compare, rows
from benchmarks.released.compare import own_encoders
from benchmarks.released.measure import STEPS, Piece, beside, decoder_pieces
from benchmarks.released.rows import PEERS, WORKS, export_row, fastest, missing, why_not


class Fake:
    """Takes `seconds` for any work; all that were opened, by name."""

    opened: ClassVar[list["Fake"]] = []

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds, self.closed, self.asked = name, seconds, False, []
        self.start = self._answer()
        Fake.opened.append(self)

    def ask(self, work: str, **arguments) -> dict:
        assert not self.closed
        self.asked.append((work, arguments))
        return self._answer()

    def _answer(self) -> dict:
        return {"seconds": self.seconds, "mib": 9000, "own_mib": int(100 * self.seconds), "mapped_mib": 7}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Fake, "opened", [])


SECONDS = {"int4": 2.0, "int4-gptq": 1.0, "llama.cpp-q4_0": 3.0}


def start(name: str) -> Fake:
    return Fake(name, SECONDS[name])


def test_each_format_of_ours_stands_beside_the_peer():
    pieces = decoder_pieces([640], [128, 2048], ("prefill", "decode"))
    found = beside("llama.cpp-q4_0", ["int4", "int4-gptq"], start, pieces, 3, loads=False)
    assert [(row["work"], row["context"], row["format"]) for row in found] == [
        (work, context, form)
        for work, context in (("prefill", 640), ("decode", 128), ("decode", 2048))
        for form in ("int4", "int4-gptq")
    ]
    prefill, decode = found[0], found[3]
    assert (prefill["metric"], prefill["ours"], prefill["theirs"], prefill["ratio"]) == ("ms", 2000, 3000, 1.5)
    assert (decode["metric"], decode["ours"], decode["ratio"]) == ("tokens/s", STEPS / 1.0, 3.0)
    assert (prefill["peak_mib"], prefill["peer_peak_mib"]) == (200, 300), "what the processes hold themselves"
    assert (prefill["mapped_mib"], prefill["peer_mapped_mib"]) == (7, 7)
    assert all(worker.closed for worker in Fake.opened)
    assert len(Fake.opened) == 3


def test_loads_are_counted_once_the_files_are_cached():
    found = beside("llama.cpp-q4_0", ["int4"], start, [], 2, loads=True)
    assert [(row["work"], row["ratio"]) for row in found] == [("load", 1.5)]
    assert [worker.name for worker in Fake.opened] == ["int4", "llama.cpp-q4_0"] * 3
    assert all(worker.closed for worker in Fake.opened)


def test_a_worker_that_fails_leaves_none_open():
    def refuse(name: str) -> Fake:
        if name == "llama.cpp-q4_0":
            raise RuntimeError("cannot open")
        return start(name)

    with pytest.raises(RuntimeError, match="cannot open"):
        beside("llama.cpp-q4_0", ["int4"], refuse, [Piece("prefill", "prefill", {}, 1)], 1, loads=False)
    assert [worker.closed for worker in Fake.opened] == [True]


def test_a_missing_peer_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setattr(rows, "not_installed", lambda name: None)
    assert why_not("openvino-bf16", ["avx2"], 13.5, 20.0) == "the processor has none of avx512_bf16, amx_bf16"
    assert why_not("openvino-bf16", ["avx512_bf16"], 13.5, 20.0) is None
    assert why_not("openvino-fp32", [], 13.5, 20.0) is None
    assert why_not("transformers-bf16", [], 13.5, 9.5) == "13.5 GB of weights, 9.5 GB of memory are left for them"
    assert why_not("transformers-bf16", [], 13.5, 14.0) is None
    monkeypatch.setattr(rows, "not_installed", lambda name: f"`make {name}`")
    assert why_not("openvino-int8", [], 1, 2) == "`make openvino`"
    assert why_not("llama.cpp-q4_k", [], 1, 2) == "`make llama.cpp-q4_k`"
    assert missing("openvino-bf16", WORKS, "why") == [{"work": "encoder", "peer": "openvino-bf16", "reason": "why"}]
    assert [row["work"] for row in missing("llama.cpp-q4_0", ("decode", "load"), "why")] == ["decode"]


def test_a_worker_that_ends_is_a_row_with_its_last_words(tmp_path: Path):
    def refuse(name: str) -> Fake:
        raise RuntimeError(f"{name} ended with -9: \n out of memory")

    plan = compare.Plan(tmp_path, 1, 256, WORKS, PEERS, [640], [], 1, 1)
    comparison = compare.Comparison(plan)
    pieces = decoder_pieces([640], [128], WORKS)
    comparison._beside("llama.cpp-q4_0", ["int4"], refuse, pieces)
    assert [row["work"] for row in comparison.rows] == ["prefill", "decode"]
    assert {row["reason"] for row in comparison.rows} == {"int4 ended with -9: out of memory"}
    comparison._beside("llama.cpp-q4_0", ["int4"], start, pieces)
    assert [row["work"] for row in comparison.rows[2:]] == ["load", "prefill", "decode"]
    assert len({tuple(rows.complete(row)) for row in comparison.rows}) == 1, "all rows have the same keys"


def test_the_fastest_is_that_of_all_contexts():
    def of(peer: str, context: int, theirs: float, form: str = "int4") -> dict:
        return {"work": "prefill", "peer": peer, "context": context, "theirs": theirs, "format": form}

    found = [of("a", 1, 5), of("a", 2, 5), of("b", 1, 1), of("b", 2, 20), of("c", 1, 4), of("c", 2, 5)]
    found += [of("c", 1, 4, "int4-gptq"), {"work": "prefill", "peer": "d", "reason": "none"}]
    assert fastest(found, "prefill", ("a", "b", "c", "d")) == "c"
    assert fastest(found, "prefill", ("d",)) is None
    assert fastest(found, "decode", ("a",)) is None
    ours = [{**of("a", 1, 5, form), "ours": taken} for form, taken in (("int4", 3), ("int4-gptq", 2), ("other", 1))]
    assert fastest(ours, "prefill", ("int4", "int4-gptq"), own=True) == "int4-gptq"


def test_quality_is_that_of_the_format_on_the_demo_model():
    def of(method: str, operators: str, perplexity: float, precision: str = "int4") -> dict:
        row = {"precision": precision, "method": method, "operators": operators}
        return row | {"text_perplexity": perplexity, "anls": perplexity / 100}

    measured = [of("q4_1", "ONNX Runtime", 1), of("q4_1", "kernels", 2), of("rtn", "kernels", 3, "int8")]
    measured += [of("gptq", "ONNX Runtime", 4), of("llama.cpp-q4_k", "ONNX Runtime", 5)]
    assert rows.quality("int4", measured) == {"perplexity": 2, "anls": 0.02}
    assert rows.quality("int4-gptq", measured)["perplexity"] == 4
    assert rows.quality("llama.cpp-q4_k", measured)["perplexity"] == 5
    assert rows.quality("transformers-bf16", measured) == {}


def test_costs_of_an_export_are_a_row():
    row = export_row("llama.cpp-q4_0", "int4", Cost(100.0, 5000, 8000), Cost(250.0, 3000, 13000))
    assert (row["ours"], row["theirs"], row["ratio"], row["metric"]) == (100.0, 250.0, 2.5, "s")
    assert (row["peak_mib"], row["peer_peak_mib"], row["peer_mapped_mib"]) == (5000, 3000, 13000)


def test_bfloat16_is_measured_where_the_processor_has_it():
    assert [*own_encoders(["avx512_vnni"])] == ["onnx-fp32"]
    assert own_encoders(["amx_bf16"])["openvino-bf16"] == {"encoder": "openvino", "encoder_precision": "bf16"}


def test_options_become_the_plan(monkeypatch, tmp_path: Path):
    plans, written = [], []

    class Comparison:
        def __init__(self, plan):
            plans.append(plan)
            self.rows = [{"work": "load"}]

        def run(self) -> dict:
            return {"layers": 2}

    monkeypatch.setattr(compare, "Comparison", Comparison)
    monkeypatch.setattr(command.record, "write", lambda *arguments: written.append(arguments))
    folder, file = tmp_path / "kept", tmp_path / "rows.json"
    options = ["--layers", "2", "--work", "decode", "--peers", "llama.cpp-q4_0", "--contexts", "128"]
    options += ["--rounds", "1", "--threads", "3", "--folder", str(folder), "--json", str(file)]
    assert command.main(options) == 0
    assert plans == [compare.Plan(folder, 2, 1536, ["decode"], ["llama.cpp-q4_0"], [640], [128], 1, 3)]
    assert written == [("released", [{"work": "load"}], file, {"layers": 2})]
    assert command.main(["--folder", str(folder)]) == 0
    assert dataclasses.replace(plans[1], folder=folder, threads=1) == compare.Plan(
        folder, 32, 1536, WORKS, PEERS, [640], [128, 640, 2048], 3, 1
    )
