"""What quantisation costs and brings, beside other quantisers, on the demo model.

    python -m benchmarks.calibration quantisers|speed|decoders|final ... [--modelopt PYTHON] [--also NAME=FILE]

quantisers: INT8 encoders of several quantisers from the same images, what they lose, and how fast they are.
speed: encoders in each precision and runtime, at 1536; it takes the encoder that `quantisers` leaves, so run that
before.
decoders: decoders of 4 and 8 bits: what answers lose, perplexity of them and of plain English text.
final: the bundle that a user would make with --budget: what it loses on 1,000 questions (a bundle that is there already
is taken as it is).

All is asked about pages of large figures of the test split, which the demo model reads. Things are timed in rounds
through all of them, so that a slow minute of the machine falls on all; medians are recorded. --modelopt: the
interpreter of an environment with `nvidia-modelopt[onnx]`, which wants other versions of onnx and onnxruntime. --also:
further encoder graphs to measure, such as one made with --budget.
"""

import argparse
import itertools
import json
import pydoc_data.topics
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from benchmarks import record
from benchmarks.peers.llama_gguf import write_graph_of
from benchmarks.peers.products import GGUF_FORMATS, gguf_files
from benchmarks.peers.turns import not_installed
from calib.activations import METHODS, Activations
from calib.bundle import REPORT, SOURCE
from calib.decoder import GPTQ_PROMPTS, prompts, quantize_decoder
from calib.encoder import MEAN_IMAGES
from calib.evaluation import Evaluation, Loss
from calib.images import Page, calibration_pixels, fewer_pages, find_pages, pixels_of, split, spread
from calib.qdq import Calibrated, measure_means
from calib.sensitivity import depthwise_of, groups_of, nodes_of
from export.cli import BUILD, open_checkpoint
from export.graphs.load import load_graph
from export.graphs.variants import write_kernels
from runtime import kernels
from runtime.backends.openvino import OpenVinoEncoder
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.bundle.manifest import Bundle, DecoderPart, open_bundle
from runtime.bundle.verify import MANIFEST
from runtime.text.tokenizer import Tokenizer

RUN, PRESET, RES = "reader_fifth", "figures-320", 320
CHECKPOINT, BUNDLE = BUILD / "carried" / RUN, BUILD / "bundle" / f"{RUN}-{RES}"
INT8 = BUILD / "bundle" / f"{BUNDLE.name}-int8.onnx"  # this project's encoder, for the parts after the first
PAGES, SAMPLES, QUESTIONS, ROUNDS, SIDE = 320, 64, 128, 9, 1536
SEARCHED, BUDGET = 64, 1  # of the bundle that a user would make
ORT = "ONNX Runtime"
BY_KERNELS = ("int8-rtn", "int4-rtn", "int4-q4_1", "int4-gptq")  # that run by the kernels too
STEPS, WINDOW, WINDOWS = 48, 512, 2  # decoded tokens that are timed; of text: tokens of a window, windows
MODELOPT = """
import sys, numpy
from modelopt.onnx.quantization import quantize
source, data, target = sys.argv[1:]
quantize(source, quantize_mode="int8", calibration_data={"pixel_values": numpy.load(data)}, calibration_method="max",
         calibration_eps=["cpu"], output_path=target, high_precision_dtype="fp32")
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="+", choices=list(PARTS))
    parser.add_argument("--modelopt", type=Path, metavar="PYTHON", help="interpreter that has nvidia-modelopt[onnx]")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FILE", help="further encoder graphs to measure")
    args = parser.parse_args()
    for what in dict.fromkeys(args.what):
        PARTS[what](args)


def open_demo() -> Bundle:
    """The bundle of the weights that are carried, made where it is not there."""
    if not (BUNDLE / MANIFEST).is_file():
        if not CHECKPOINT.is_dir():
            run("train.model.demo", "--unpack", f"train/runs/convllava-smol/{RUN}.safetensors", CHECKPOINT)
        run("export.bundle", "--checkpoint", CHECKPOINT, "--res", RES, "--out", BUNDLE)
    return open_bundle(BUNDLE)


def run(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def documents() -> Path:
    """What is calibrated on and asked about, drawn where it is not there."""
    folder = BUILD / "data" / f"{RUN}-test"
    if not folder.is_dir():
        run("train.synth", "--out", folder, "--pages", PAGES, "--split", "test", "--preset", PRESET)
    return folder / "documents.json"


def quantisers(args: argparse.Namespace) -> None:
    bundle = open_demo()
    calibration, held_out = split(find_pages(documents()), SAMPLES, QUESTIONS)
    evaluation = Evaluation(bundle, fewer_pages(held_out, QUESTIONS), QUESTIONS)
    with tempfile.TemporaryDirectory() as folder:
        made = list(encoders(bundle, calibration, Path(folder), args.modelopt))
        shutil.copyfile(made[0][1], INT8)
        for name, _, file in (text.partition("=") for text in args.also):
            made.append(({"quantiser": name, "seconds": ""}, Path(file)))
        speeds = time_in_turn({row["quantiser"]: OnnxEncoder(file, bundle.encoder.stride) for row, file in made})
        for row, file in made:
            loss = evaluation.loss(file)
            row |= {"sqnr_db": round(loss.sqnr_db, 1), "differing": round(loss.differing, 1)}
            row |= {"anls": answered(evaluation, loss), "encode_ms": speeds[row["quantiser"]]}
            print(row, flush=True)
    record.write("calibration", [row for row, _ in made], more=asked(evaluation))


def answered(evaluation: Evaluation, loss: Loss) -> float:
    """ANLS, 0 to 1."""
    return round(evaluation.score.anls - loss.anls / 100, 3)


def asked(evaluation: Evaluation) -> dict:
    """What losses are measured on, and what float32 scores there."""
    return {
        "questions": evaluation.questions,
        "next_tokens": evaluation.tokens,
        "float32_anls": round(evaluation.score.anls, 3),
    }


def encoders(bundle: Bundle, calibration: list[Page], folder: Path, modelopt: Path | None):
    """(row, INT8 graph) of each quantiser."""
    source = bundle.path(SOURCE)
    graph = onnx.load(source, load_external_data=False).graph
    groups = groups_of(graph)
    depthwise = nodes_of(groups, depthwise_of(graph, groups))
    feeds = list(calibration_pixels(calibration, bundle.image))

    def timed(name: str, write: Callable[[Path], None], before: float = 0.0):
        file = folder / f"{len(list(folder.iterdir()))}.onnx"
        begin = time.perf_counter()
        write(file)
        return {"quantiser": name, "seconds": round(time.perf_counter() - begin + before, 1)}, file

    begin = time.perf_counter()
    activations = Activations(source)
    activations.collect(feeds)
    collecting = time.perf_counter() - begin
    for method in METHODS:
        begin = time.perf_counter()
        ranges = activations.ranges(method)[0]
        before = collecting + time.perf_counter() - begin
        plain = Calibrated(source, "int8", ranges)
        if method == "mse":
            begin = time.perf_counter()
            means = measure_means(source, ranges, "int8", spread(feeds, MEAN_IMAGES))
            whole = Calibrated(source, "int8", ranges, means)
            corrected = before + time.perf_counter() - begin
            yield timed(
                "this project: mse, biases corrected, depthwise float32",
                partial(whole.write, excluded=depthwise),
                corrected,
            )
            yield timed("the same, depthwise INT8 too", whole.write, corrected)
        write = partial(plain.write, excluded=depthwise)
        yield timed(f"{method}, biases as they were, depthwise float32", write, before)
    yield timed("NNCF", partial(nncf_encoder, source, feeds))
    if modelopt is not None:
        squares = np.stack([pixels_of(page, bundle.image) for page in spread(calibration, 16)])
        np.save(folder / "squares.npy", squares)
        shutil.copyfile(source, folder / "source.onnx")  # it writes to the file that it is given
        command = [modelopt, "-c", MODELOPT, folder / "source.onnx", folder / "squares.npy"]
        yield timed(
            "Model Optimizer, 16 images of one size",
            lambda file: subprocess.run([*map(str, [*command, file])], check=True),
        )


def nncf_encoder(source: Path, feeds: list[tuple[str, np.ndarray]], target: Path) -> None:
    import nncf

    dataset = nncf.Dataset([pixels for _, pixels in feeds], lambda pixels: {"pixel_values": pixels})
    preset = nncf.QuantizationPreset.PERFORMANCE  # symmetric, as TensorRT has it
    onnx.save(nncf.quantize(load_graph(source), dataset, preset=preset, subset_size=len(feeds)), target)


def speed(args: argparse.Namespace) -> None:
    bundle = open_demo()
    source, stride = bundle.path(SOURCE), bundle.encoder.stride
    speeds = time_in_turn(
        {
            ("ONNX Runtime", "fp32"): OnnxEncoder(source, stride),
            ("ONNX Runtime", "int8"): OnnxEncoder(INT8, stride),
            ("OpenVINO", "fp32"): OpenVinoEncoder(source),
            ("OpenVINO", "bf16"): OpenVinoEncoder(source, precision="bf16"),
            ("OpenVINO", "int8"): OpenVinoEncoder(INT8, precision="int8"),
            ("OpenVINO", "int8, the rest in bf16"): OpenVinoEncoder(INT8, precision="bf16"),
        }
    )
    rows = [{"runtime": key[0], "precision": key[1], "encode_ms": ms} for key, ms in speeds.items()]
    record.write("encoder_speed", rows)


def time_in_turn(encoders: dict) -> dict:
    """Median milliseconds of each encoder for one image of SIDE x SIDE; the first round warms up."""
    image = np.random.default_rng(0).standard_normal((3, SIDE, SIDE), dtype=np.float32)
    samples = {key: [] for key in encoders}
    for _ in range(ROUNDS + 1):
        for key, encoder in encoders.items():
            begin = time.perf_counter()
            encoder([image])
            samples[key].append((time.perf_counter() - begin) * 1000)
    return {key: round(statistics.median(taken[1:]), 1) for key, taken in samples.items()}


def decoders(args: argparse.Namespace) -> None:
    bundle = open_demo()
    source, part = bundle.path(bundle.decoder.file), bundle.decoder
    calibration, held_out = split(find_pages(documents()), GPTQ_PROMPTS, QUESTIONS)
    evaluation = Evaluation(bundle, fewer_pages(held_out, QUESTIONS), QUESTIONS)
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer, bundle.decoder.vocab_size)
    text = np.array(english(lambda text: tokenizer.encode_prompt(text, []), WINDOWS * WINDOW)).reshape(WINDOWS, WINDOW)
    rows, opened = [], []

    def measure(decoder: OnnxDecoder, row: dict) -> None:
        opened.append(decoder)
        loss = evaluation.loss(decoder=decoder)
        row |= {
            "anls": answered(evaluation, loss),
            "text_perplexity": round(perplexity(decoder, text), 2),
            "answer_perplexity": round(loss.perplexity, 2),
            "differing": round(loss.differing, 1),
        }
        rows.append(row)
        print(row, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        about = {"precision": "fp32", "method": "as exported", "operators": ORT} | size(source) | {"seconds": 0.0}
        measure(OnnxDecoder(source, part), about)
        for precision, method in (("int8", "rtn"), *(("int4", method) for method in ("q4_1", "gptq", "rtn"))):
            pages = spread(calibration, GPTQ_PROMPTS if method == "gptq" else 0)
            feeds = list(prompts(bundle, bundle.path(SOURCE), pages))
            file = Path(folder, f"{precision}-{method}.onnx")
            begin = time.perf_counter()
            quantize_decoder(source, file, precision, method, feeds)
            seconds = round(time.perf_counter() - begin, 1)
            about = {"precision": precision, "method": method, "operators": ORT} | size(file) | {"seconds": seconds}
            measure(OnnxDecoder(file, part), about)
            by_kernels = file.with_suffix(".kernels.onnx")
            if file.stem in BY_KERNELS and kernels.unavailable() is None and write_kernels(file, by_kernels):
                measure(OnnxDecoder(by_kernels, part, operators=kernels.library()), about | {"operators": "kernels"})
        for row, rate in zip(rows, rates_in_turn(opened), strict=True):
            row["decode_tokens_per_s"] = rate
        if how := not_installed("llama.cpp"):
            print(f"llama.cpp's formats are left out: {how}", file=sys.stderr)
        else:
            llama_cpp_formats(Path(folder), part, measure)
        record.write("decoder_weights", rows, more=asked(evaluation))


def llama_cpp_formats(folder: Path, part: DecoderPart, measure: Callable[[OnnxDecoder, dict], None]) -> None:
    """What llama.cpp's 4-bit weights lose: they are multiplied in float32 here, so that nothing else differs."""
    checkpoint = open_checkpoint(None)
    for form, (file, cost) in gguf_files(checkpoint.folder, folder, GGUF_FORMATS).items():
        graph = folder / f"{form}.onnx"
        write_graph_of(file, checkpoint, graph)
        about = {"precision": "int4", "method": f"llama.cpp-{form}", "operators": ORT}
        about |= {"size_mb": round(file.stat().st_size / 1e6, 1), "seconds": cost.seconds, "decode_tokens_per_s": ""}
        measure(OnnxDecoder(graph, part), about)


def final(args: argparse.Namespace) -> None:
    out = BUNDLE.with_name(f"{BUNDLE.name}-int8")
    if not (out / MANIFEST).is_file():
        options = ("--questions", SEARCHED, "--budget", BUDGET, "--out", out)
        run("calib.quantize", "--bundle", open_demo().folder, "--data", documents(), *options)
    report = json.loads((out / REPORT / "encoder-int8.json").read_text())
    measured = ("sqnr_db", "differing", "perplexity", "anls", "grounding")
    rows = [{"left": len(step["left"])} | {key: step[key] for key in measured} for step in report["rounds"]]
    keys = ("budget", "float32", "calibration_images", "questions", "next_tokens", "left_in_higher_precision")
    record.write("quantised", rows, more={key: report[key] for key in (*keys, "sets", "rounds", "alone")})


def size(file: Path) -> dict[str, float]:
    """Of a decoder's graph and weights."""
    return {"size_mb": round(sum(path.stat().st_size for path in (file, Path(f"{file}.data"))) / 1e6, 1)}


def english(encode: Callable[[str], list[int]], count: int) -> list[int]:
    """So many ids of the language reference that comes with Python."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return encode(text[: 12 * count])[:count]


def perplexity(decoder: OnnxDecoder, text: np.ndarray) -> float:
    """Of each window's tokens but the first."""
    log_probs = []
    for window in text.tolist():
        sequence = decoder.start(len(window))
        for token, following in itertools.pairwise(window):
            logits = sequence.forward([token]).astype(np.float64)
            log_probs.append(logits[following] - np.logaddexp.reduce(logits))
    return float(np.exp(-np.mean(log_probs)))


def rates_in_turn(decoders: list[OnnxDecoder]) -> list[float]:
    """Median tokens/s of each over STEPS steps after 64 tokens."""
    samples = [[] for _ in decoders]
    for _ in range(ROUNDS):
        for decoder, taken in zip(decoders, samples, strict=True):
            sequence = decoder.start(64 + STEPS)
            sequence.forward_greedy(list(range(100, 164)))
            begin = time.perf_counter()
            for step in range(STEPS):
                sequence.forward_greedy([200 + step])
            taken.append(STEPS / (time.perf_counter() - begin))
    return [round(statistics.median(taken[1:]), 1) for taken in samples]


PARTS = {"quantisers": quantisers, "speed": speed, "decoders": decoders, "final": final}

if __name__ == "__main__":
    main()
