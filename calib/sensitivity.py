"""What quantisation costs, layer group by layer group, and the smallest set of groups to leave in higher precision."""

import math
import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import onnx
from tqdm import tqdm

from calib.activations import QUANTISED
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
    """A set of groups left in higher precision. sqnr_db: of the image embeds with the rest quantised. loss: None where
    it was not asked for."""

    left: tuple[str, ...]
    sqnr_db: float
    loss: Loss | None = None


def measure(calibrated: Calibrated, groups: list[Group], left: Collection[str], what: Callable[[Path], T]) -> T:
    """What `what` says of the graph with the groups named in `left` in higher precision."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tried.onnx")
        calibrated.write(file, [node for group in groups if group.name in left for node in group.nodes])
        return what(file)


def nested(
    calibrated: Calibrated, groups: list[Group], always: Collection[str], alone: dict[str, Loss], evaluation: Evaluation
) -> list[Step]:
    """Sets of groups to leave in higher precision, each with one group more than the one before: `always` at first,
    then the others, those of lowest SQNR alone before the rest, until every group is left. Errors of groups add up,
    within 1 dB on the demo model, so that no other set of as many groups does better.

    alone: as `sensitivities` gives it.
    """
    others = [group.name for group in groups if group.name not in always]
    worst_first = sorted(others, key=lambda name: alone[name].sqnr_db)
    steps = []
    for count in tqdm(range(len(others) + 1), "worst groups left", unit="set", disable=None):
        left = tuple(group.name for group in groups if group.name in {*always, *worst_first[:count]})
        steps.append(Step(left, measure(calibrated, groups, left, evaluation.sqnr_db)))
    return steps


def settle(sets: list[Step], loss_of: Callable[[tuple[str, ...]], Loss], first: Loss, budget: float) -> list[Step]:
    """The smallest of the sets with which `Loss.budgeted` is at most `budget`, by its loss on all questions.

    A loss is dear to measure and, on few questions, noisy; SQNR is neither. So the next set to measure is the one that
    has as many dB more, or less, as the loss before says: it is taken to be proportional to the error's magnitude, so
    that a loss of twice the budget wants 6 dB more. Once one set holds and another does not, those between them are
    halved; ROUNDS sets in all.

    sets: as `nested`. loss_of: what it costs, on all questions, to leave these groups alone in higher precision. first:
    the loss of the first set on a few questions. Returns the sets whose loss was measured, the last of which is the one
    to take: the smallest that holds, or else the one that lost least.
    """
    rounds: list[Step] = []
    missed, held = -1, len(sets)  # the largest set that is known to lose too much, the smallest that does not
    index = _reaching(sets, sets[0].sqnr_db + _excess_db(first.budgeted, budget))
    while missed < index < held and len(rounds) < ROUNDS:
        step = replace(sets[index], loss=loss_of(sets[index].left))
        rounds.append(step)
        missed, held = (missed, index) if step.loss.budgeted <= budget else (index, held)
        if math.isinf(step.sqnr_db) or (missed >= 0 and held < len(sets)):
            index = (missed + held) // 2
        else:
            index = _reaching(sets, step.sqnr_db + _excess_db(step.loss.budgeted, budget))
            index = min(max(index, missed + 1), held - 1)
    best = min(rounds, key=lambda one: (max(one.loss.budgeted, budget), len(one.left)))
    return [*(one for one in rounds if one is not best), best]


def _reaching(sets: list[Step], target_db: float) -> int:
    """The first set of so many dB, else the last."""
    return next((i for i, step in enumerate(sets) if step.sqnr_db >= target_db), len(sets) - 1)


def _excess_db(loss: float, budget: float) -> float:
    """How much smaller the error must be for the loss to shrink to the budget, dB; below 0 where it may be larger."""
    if loss <= 0:
        return -math.inf
    return 20 * math.log10(loss / budget) if budget > 0 else math.inf
