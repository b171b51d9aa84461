"""What quantisation costs, layer group by layer group, and the smallest set of groups to leave in higher precision.

Two measures, both against the float32 encoder and on images that the ranges do not come from:
- SQNR of the image embeds, dB: the energy of the signal over that of the error;
- next tokens that differ, %: the float32 encoder's answers to fixed questions are fed token by token, and at each the
  likeliest next one is compared. The decoder is the bundle's.
"""

import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import TensorsData

from calib.qdq import QUANTISED, quantise
from runtime.bundle import Bundle
from runtime.decoder import Decoder
from runtime.encoder import OnnxEncoder
from runtime.prompt import first_turn
from runtime.tokenizer import Tokenizer

QUESTIONS = ("What is written here?", "Describe the picture in one sentence.")
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Group:
    """Layers that are quantised, or left, together. nodes: names of convolutions and products."""

    name: str
    nodes: tuple[str, ...]


def groups_of(graph: onnx.GraphProto) -> list[Group]:
    """The groups of a ConvNeXt with a projector, in the order of a forward pass: the stem, each stage's downsampling,
    depthwise convolutions and both products of its MLPs, and the projector.

    Convolutions keep the model's names for their weights, products do not: those after a depthwise convolution are its
    block's first and second, and those after the last block the projector's.
    """
    found: dict[str, list[str]] = {}
    block, products = "", 0
    for node in graph.node:
        if node.op_type not in QUANTISED:
            continue
        if node.op_type == "Conv":
            name, block, products = _group_of_convolution(node.input[1], block)
        else:
            products += 1
            name = {1: f"{block} MLP in", 2: f"{block} MLP out"}.get(products, "projector")
        found.setdefault(name, []).append(node.name)
    return [Group(name, tuple(nodes)) for name, nodes in found.items()]


def _group_of_convolution(weights: str, block: str) -> tuple[str, str, int]:
    """(group, stage whose products follow, products seen since)."""
    stage = re.search(r"stages\.(\d+)\.", weights)
    if stage is None:
        return "stem", block, 0
    name = f"stage {stage[1]}"
    return (f"{name} depthwise" if "conv_dw" in weights else f"{name} downsample"), name, 0


def sqnr_db(found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> float:
    """Signal to quantisation noise of all arrays together, dB; infinite where they are equal."""
    signal = noise = 0.0
    for one, other in zip(found, expected, strict=True):
        signal += float(np.sum(np.square(other, dtype=np.float64)))
        noise += float(np.sum(np.square(np.subtract(one, other, dtype=np.float64))))
    return float(10 * np.log10(signal / noise)) if noise else float("inf")


@dataclass(frozen=True)
class Loss:
    """What an encoder loses. differing: next tokens that differ, %."""

    sqnr_db: float
    differing: float


class Evaluation:
    """Compares encoders with the bundle's float32 one. images: float32 [1, 3, H, W] each."""

    def __init__(self, bundle: Bundle, source: Path, images: list[np.ndarray]):
        self._images, self._stride = [pixels[0] for pixels in images], bundle.encoder.stride
        self._embeds = self._encode(source)
        self._decoder = Decoder(bundle.path(bundle.decoder.file), bundle.decoder)
        tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer)
        self._prompts = [
            tokenizer.encode_prompt(first_turn(bundle.prompt, QUESTIONS[i % len(QUESTIONS)], 1), [len(embeds)])
            for i, embeds in enumerate(self._embeds)
        ]
        cases = zip(self._prompts, self._embeds, strict=True)
        self._answers = [self._answer(ids, embeds, tokenizer.eos_token_ids) for ids, embeds in cases]

    def loss(self, file: Path) -> Loss:
        """Of the encoder graph `file`."""
        embeds = self._encode(file)
        differing = total = 0
        for ids, rows, answer in zip(self._prompts, embeds, self._answers, strict=True):
            found = self._next_tokens(ids, rows, answer)
            differing += sum(one != other for one, other in zip(found, answer, strict=True))
            total += len(answer)
        return Loss(sqnr_db(embeds, self._embeds), 100 * differing / total)

    def sqnr_db(self, file: Path) -> float:
        """Of the encoder graph `file`, without asking the decoder."""
        return sqnr_db(self._encode(file), self._embeds)

    def _encode(self, file: Path) -> list[np.ndarray]:
        encoder = OnnxEncoder(file, self._stride)
        return [encoder([image]) for image in self._images]

    def _answer(self, ids: list[int], embeds: np.ndarray, end: Collection[int]) -> list[int]:
        sequence = self._decoder.start(len(ids) + ANSWER_TOKENS)
        answer = [sequence.forward_greedy(ids, embeds)]
        while len(answer) < ANSWER_TOKENS and answer[-1] not in end:
            answer.append(sequence.forward_greedy(answer[-1:]))
        return answer

    def _next_tokens(self, ids: list[int], embeds: np.ndarray, answer: list[int]) -> list[int]:
        """The likeliest token after the prompt, and after each token of `answer` but the last."""
        sequence = self._decoder.start(len(ids) + len(answer))
        return [sequence.forward_greedy(ids, embeds), *(sequence.forward_greedy([token]) for token in answer[:-1])]


def sensitivities(
    source: Path, ranges: TensorsData, precision: str, groups: list[Group], evaluation: Evaluation
) -> dict[str, float]:
    """SQNR of the image embeds, dB, with one group alone quantised, by the group's name."""
    everything = {node for group in groups for node in group.nodes}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "one.onnx")
        for group in groups:
            quantise(source, file, ranges, precision, everything.difference(group.nodes))
            found[group.name] = evaluation.sqnr_db(file)
    return found


@dataclass(frozen=True)
class Step:
    """A set of groups left in higher precision, and what the rest costs."""

    left: tuple[str, ...]
    loss: Loss


def search(
    source: Path,
    ranges: TensorsData,
    precision: str,
    groups: list[Group],
    noise: dict[str, float],
    evaluation: Evaluation,
    budget: float,
) -> list[Step]:
    """From everything quantised on, leave the group with the lowest SQNR of those that remain, until at most `budget` %
    of next tokens differ; then quantise again, best first, what the budget allows.

    noise: as `sensitivities` gives it. Returns every step that was tried; the last one holds, whose loss is within the
    budget unless leaving everything is not enough.
    """
    nodes = {group.name: group.nodes for group in groups}
    worst_first = sorted(nodes, key=lambda name: noise.get(name, 0.0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tried.onnx")

        def tried(left: tuple[str, ...]) -> Step:
            quantise(source, file, ranges, precision, [node for name in left for node in nodes[name]])
            return Step(left, evaluation.loss(file))

        steps = [tried(())]
        while steps[-1].loss.differing > budget and len(steps[-1].left) < len(nodes):
            steps.append(tried(tuple(worst_first[: len(steps[-1].left) + 1])))
        best = steps[-1]
        for name in reversed(best.left[:-1]):  # without the last one the budget was exceeded
            step = tried(tuple(other for other in best.left if other != name))
            steps.append(step)
            if step.loss.differing <= budget:
                best = step
        if steps[-1] != best:
            steps.append(best)
    return steps
