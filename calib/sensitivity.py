"""Per-group sensitivity to quantization, and the smallest set of groups to keep in higher precision."""

import math
import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import onnx
from tqdm import tqdm

from calib.activations import QUANTIZED
from calib.evaluation import Evaluation, Loss
from calib.qdq import Calibrated, is_depthwise

T = TypeVar("T")
ROUNDS = 4  # sets of groups whose loss is measured on all questions


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
        if node.op_type not in QUANTIZED:
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


def depthwise_of(graph: onnx.GraphProto, groups: list[Group]) -> tuple[str, ...]:
    """Names of the groups that are depthwise convolutions."""
    depthwise = {node.name for node in graph.node if is_depthwise(node)}
    return tuple(group.name for group in groups if depthwise.issuperset(group.nodes))


def sensitivities(calibrated: Calibrated, groups: list[Group], evaluation: Evaluation) -> dict[str, Loss]:
    """What each group costs alone, by its name."""
    names = [group.name for group in groups]
    found = {}
    for name in tqdm(names, "one group alone", unit="group", disable=None):
        others = [other for other in names if other != name]
        found[name] = measure(calibrated, groups, others, evaluation.loss)
    return found


@dataclass(frozen=True)
class Step:
    """A set of groups kept in higher precision.

    Args:
        sqnr_db: of the image embeddings with the other groups quantized.
        loss: None where it was not measured.
    """

    excluded: tuple[str, ...]
    sqnr_db: float
    loss: Loss | None = None


def nodes_of(groups: list[Group], names: Collection[str]) -> list[str]:
    """The nodes of the groups named."""
    return [node for group in groups if group.name in names for node in group.nodes]


def measure(calibrated: Calibrated, groups: list[Group], excluded: Collection[str], metric: Callable[[Path], T]) -> T:
    """`metric` of the graph with the groups named in `excluded` in higher precision."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tried.onnx")
        calibrated.write(file, nodes_of(groups, excluded))
        return metric(file)


def candidate_sets(
    calibrated: Calibrated, groups: list[Group], always: Collection[str], alone: dict[str, Loss], evaluation: Evaluation
) -> list[Step]:
    """Sets of groups to exclude, each with one group more than the one before: `always` first, then the others from the
    lowest SQNR alone to the highest, until every group is excluded. Errors of groups add up, within 1 dB on the demo
    model, so no other set of as many groups does better.

    Args:
        alone: as `sensitivities` gives it.
    """
    others = [group.name for group in groups if group.name not in always]
    worst_first = sorted(others, key=lambda name: _sqnr_db(alone[name]))
    steps = []
    for count in tqdm(range(len(others) + 1), "worst groups excluded", unit="set", disable=None):
        excluded = tuple(group.name for group in groups if group.name in {*always, *worst_first[:count]})
        steps.append(Step(excluded, measure(calibrated, groups, excluded, evaluation.sqnr_db)))
    return steps


def _sqnr_db(loss: Loss) -> float:
    assert loss.sqnr_db is not None  # measured with an encoder
    return loss.sqnr_db


def search(sets: list[Step], loss_of: Callable[[tuple[str, ...]], Loss], first: Loss, budget: float) -> list[Step]:
    """The smallest of the sets with which `Loss.budgeted` is at most `budget`, by its loss on all questions.

    A loss is expensive to measure and, on few questions, noisy; SQNR is neither. So the next set is chosen by SQNR: the
    loss is assumed proportional to the error's magnitude, so that a loss of twice the budget needs 6 dB more. Once one
    set holds and another does not, the sets between them are bisected; ROUNDS sets in all.

    Args:
        sets: as `candidate_sets` gives them.
        loss_of: the loss on all questions with these groups excluded.
        first: the loss of the first set on a few questions.

    Returns:
        The sets whose loss was measured; the last is the one to take: the smallest that holds, or else the one that
        lost least.
    """
    rounds: list[Step] = []
    missed, held = -1, len(sets)  # the largest set that is known to lose too much, the smallest that does not
    index = _reaching(sets, sets[0].sqnr_db + _excess_db(first.budgeted, budget))
    while missed < index < held and len(rounds) < ROUNDS:
        step = replace(sets[index], loss=(loss := loss_of(sets[index].excluded)))
        rounds.append(step)
        missed, held = (missed, index) if loss.budgeted <= budget else (index, held)
        if math.isinf(step.sqnr_db) or (missed >= 0 and held < len(sets)):
            index = (missed + held) // 2
        else:
            index = _reaching(sets, step.sqnr_db + _excess_db(loss.budgeted, budget))
            index = min(max(index, missed + 1), held - 1)
    best = min(rounds, key=lambda one: (max(one.loss.budgeted, budget) if one.loss else math.inf, len(one.excluded)))
    return [*(one for one in rounds if one is not best), best]


def _reaching(sets: list[Step], target_db: float) -> int:
    """The first set of so many dB, else the last."""
    return next((i for i, step in enumerate(sets) if step.sqnr_db >= target_db), len(sets) - 1)


def _excess_db(loss: float, budget: float) -> float:
    """How much smaller the error must be for the loss to shrink to the budget, dB; below 0 where it may be larger."""
    if loss <= 0:
        return -math.inf
    return 20 * math.log10(loss / budget) if budget > 0 else math.inf
