"""The comparison: makes what is missing in its folder, then measures each peer beside ours."""

import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.first_token import page, spec_of
from benchmarks.limits import DecoderFiles, decoder_limit, machine_limits
from benchmarks.peers.products import Cost, ProductError, gguf_files, make
from benchmarks.peers.turns import Running, interpreter, versions_of_peers
from benchmarks.record import RESULTS, instructions
from benchmarks.released.checkpoint import Shape, main_shapes
from benchmarks.released.measure import (
    STEPS,
    Piece,
    Start,
    beside,
    decoder_pieces,
    encoder_piece,
    first_token_piece,
)
from benchmarks.released.rows import (
    BF16_INSTRUCTIONS,
    DECODERS,
    ENCODERS,
    GGUF_PEERS,
    complete,
    export_row,
    fastest,
    missing,
    quality,
    why_not,
)
from runtime.bundle.manifest import Bundle, open_bundle
from train.model import Checkpoint

GPTQ = "int4-gptq"  # 4.25 bits a weight
INT4 = "int4"  # as export.bundle makes it
FLOAT32 = "onnx-fp32"  # our encoder
OWN_SHARE = 0.7  # of the weights in 16 bits, what our decoders take beside a peer


@dataclass(frozen=True)
class Plan:
    """What is measured, with what.

    folder: keeps checkpoint, bundles and what peers make of them, for the next run. res: side of the image, pixels.
    tokens: of prompts; contexts: positions before decode steps.
    """

    folder: Path
    layers: int
    res: int
    works: Sequence[str]
    peers: Sequence[str]
    tokens: Sequence[int]
    contexts: Sequence[int]
    rounds: int
    threads: int


@dataclass
class Comparison:
    """rows: all so far."""

    plan: Plan
    rows: list[dict] = field(default_factory=list)

    def run(self) -> dict:
        """Fill `rows`; returns what else the results file says."""
        plan = self.plan
        limits = machine_limits(plan.threads)
        self.checkpoint = plan.folder / "checkpoint"
        command = [sys.executable, "-m", "benchmarks.released", "checkpoint", "--layers", str(plan.layers), "--out"]
        make(self.checkpoint, lambda out: [*command, out])
        self.config = Checkpoint.open(self.checkpoint).llama_config
        bundles, costs = self._export()
        graphs = self._encoders(bundles[INT4])
        models = self._decoders(bundles, costs)
        weights = json.loads((RESULTS / "decoder_weights.json").read_text())["rows"]
        parts = {form: DecoderFiles.of(bundle) for form, bundle in bundles.items()}
        for found in self.rows:
            if found["work"] in ("prefill", "decode") and "ours" in found:
                found |= decoder_limit(found | {"batch": 1}, parts[found["format"]], self.config, limits)
                found |= quality(found["format"], weights)
                found |= {f"peer_{key}": value for key, value in quality(found["peer"], weights).items()}
        if "first_token" in plan.works:
            self._first_token(bundles, graphs, models)
        self.rows = [complete(found) for found in self.rows]
        about = {"threads": plan.threads, "layers": plan.layers, "versions_of_peers": versions_of_peers()}
        return about | {"limits": {key: round(value, 1) for key, value in limits.items()}}

    def _export(self) -> tuple[dict[str, Bundle], dict[str, Cost]]:
        """Our bundles and what they cost, by format."""
        folder = self.plan.folder
        export = [sys.executable, "-m", "export.bundle", "--checkpoint", self.checkpoint]
        export += ["--res", str(self.plan.res), "--decoder-precision", "int4", "--out"]
        costs = {INT4: make(folder / INT4, lambda out: [*export, out])}
        rounded = [sys.executable, "-m", "benchmarks.released.rounded", self.checkpoint, folder / INT4]
        try:
            costs[GPTQ] = make(folder / GPTQ, lambda out: [*rounded, out])
        except ProductError as error:
            self.rows.append({"work": "export", "format": GPTQ, "reason": str(error)})
        return {form: open_bundle(folder / form) for form in costs}, costs

    def _takes_part(self, peer: str) -> bool:
        """Whether a peer can; else its rows say why not."""
        weights = 2 * sum(map(math.prod, main_shapes(self.config, Shape.encoder).values()))
        free = available_bytes() - OWN_SHARE * weights
        reason = why_not(peer, instructions(), weights / 1e9, free / 1e9)
        if reason:
            self.rows += missing(peer, self.plan.works, reason)
        return not reason

    def _beside(self, peer: str, forms: list[str], start: Start, pieces: list[Piece], loads: bool = True) -> None:
        """The peer's rows; a worker that ends is one with its last words."""
        plan = self.plan
        try:
            self.rows += beside(peer, forms, start, pieces, plan.rounds, loads and "load" in plan.works)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            self.rows += [{"work": piece.work, "peer": peer, "reason": reason[-300:]} for piece in pieces]

    def _encoders(self, bundle: Bundle) -> dict[str, str]:
        """OpenVINO beside our encoder; returns the graphs that it ran, by peer."""
        graph = bundle.path(bundle.encoder_file("fp32") or bundle.encoder.file)
        graphs = {}
        for peer in [name for name in ENCODERS if name in self.plan.peers]:
            if not self._takes_part(peer):
                continue
            graphs[peer] = str(graph)
            if peer == "openvino-int8":
                folder = self.plan.folder / peer
                command = [interpreter("llama.cpp"), "-m", "benchmarks.peers.openvino_int8", graph]
                try:
                    make(folder, lambda out, command=command: [*command, out])
                except ProductError as error:
                    self.rows += missing(peer, self.plan.works, str(error))
                    del graphs[peer]
                    continue
                graphs[peer] = str(folder / "encoder.xml")
            if "encoder" not in self.plan.works:
                continue
            common = {"stride": bundle.encoder.stride, "threads": self.plan.threads}
            specs = {FLOAT32: common | {"graph": str(graph)}, peer: common | {"graph": graphs[peer]}}
            specs[peer]["hint"] = ENCODERS[peer]

            def start(name: str, specs: dict = specs) -> Running:
                return Running("encoders", "ours" if name == FLOAT32 else "openvino", specs[name])

            self._beside(peer, [FLOAT32], start, [encoder_piece(self.plan.res)])
        return graphs

    def _decoders(self, bundles: dict[str, Bundle], costs: dict[str, Cost]) -> dict[str, str]:
        """llama.cpp and transformers beside our decoders; returns llama.cpp's files, by peer."""
        plan = self.plan
        pieces = decoder_pieces(plan.tokens, plan.contexts, plan.works)
        capacity = max([*plan.tokens, *plan.contexts, 2]) + STEPS + 1
        ids = np.random.default_rng(0).integers(3, self.config.vocab_size, capacity).tolist()
        common = {"threads": plan.threads, "capacity": capacity, "hidden": self.config.hidden_size, "ids": ids}
        common |= {"checkpoint": str(self.checkpoint), "products": "auto"}
        peers = [name for name in DECODERS if name in plan.peers and self._takes_part(name)]
        models = self._gguf([name for name in peers if name in GGUF_PEERS], costs[INT4])
        for peer in peers:
            if peer in GGUF_PEERS and peer not in models:
                continue
            if not pieces and "load" not in plan.works:
                continue
            specs = {ours: common | {"bundle": str(bundle.folder)} for ours, bundle in bundles.items()}
            specs[peer] = common | {"folders": models}

            def start(name: str, specs: dict = specs) -> Running:
                return Running("decoders", name if name in DECODERS else "ours", specs[name], interpreter(name))

            self._beside(peer, [*bundles], start, pieces)
        return models

    def _gguf(self, peers: list[str], own: Cost) -> dict[str, str]:
        """llama.cpp's files, by peer; their export is a row beside ours."""
        if not peers:
            return {}
        try:
            files = gguf_files(self.checkpoint, self.plan.folder / "gguf", [GGUF_PEERS[peer] for peer in peers])
        except ProductError as error:
            for peer in peers:
                self.rows += missing(peer, self.plan.works, str(error))
            return {}
        if "export" in self.plan.works:
            self.rows += [export_row(peer, INT4, own, files[GGUF_PEERS[peer]][1]) for peer in peers]
        return {peer: str(files[GGUF_PEERS[peer]][0]) for peer in peers}

    def _first_token(self, bundles: dict[str, Bundle], graphs: dict[str, str], models: dict[str, str]) -> None:
        """Our fastest decoder behind each encoder, beside the fastest encoder before the fastest decoder of others."""
        encoder = fastest(self.rows, "encoder", graphs) or next(iter(graphs), None)
        decoder = fastest(self.rows, "prefill", models) or next(iter(models), None)
        form = fastest(self.rows, "prefill", bundles, own=True) or INT4
        if not encoder or not decoder:
            self.rows.append({"work": "first_token", "peer": "", "reason": "no encoder or no decoder to compare with"})
            return
        peer, threads = f"{encoder}+{decoder}", self.plan.threads
        image = page(self.plan.folder)
        specs = {
            f"{form}, {name}": spec_of(bundles[form], image, threads) | {"backends": options}
            for name, options in own_encoders(instructions()).items()
        }
        specs[peer] = spec_of(bundles[INT4], image, threads)
        specs[peer] |= {"graph": graphs[encoder], "hint": ENCODERS[encoder], "gguf": models[decoder]}
        chains = [name for name in specs if name != peer]
        for chain in chains:  # of which no two fit beside the peer

            def start(name: str) -> Running:
                return Running("chains", "openvino+llama.cpp" if name == peer else "ours", specs[name], python(name))

            def python(name: str) -> Path:
                return interpreter(name) if name == peer else Path(sys.executable)

            piece = first_token_piece(self.plan.res)
            self._beside(peer, [chain], start, [piece], loads=False)


def own_encoders(found: Collection[str]) -> dict[str, dict[str, str]]:
    """What our chain is measured with: `runtime.backends.select.Backends`' options by name. found: instructions."""
    encoders = {FLOAT32: {"encoder": "onnx", "encoder_precision": "fp32"}}
    if set(BF16_INSTRUCTIONS) & set(found):
        encoders["openvino-bf16"] = {"encoder": "openvino", "encoder_precision": "bf16"}
    return encoders


def available_bytes() -> int:
    """Memory that processes can still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
