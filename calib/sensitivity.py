"""What quantisation costs, layer group by layer group, and the smallest set of groups to leave in higher precision."""

import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
from tqdm import tqdm

from calib.activations import QUANTISED
from calib.evaluation import Evaluation, Loss
from calib.qdq import Calibrated, is_depthwise

ROUNDS = 4  # searches, each for less, where the result exceeds the budget on more questions


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
        found[name] = measure(calibrated, groups, [other for other in names if other != name], evaluation).loss
    return found


@dataclass(frozen=True)
class Step:
    """A set of groups left in higher precision, and what the rest costs."""

    left: tuple[str, ...]
    loss: Loss


def measure(calibrated: Calibrated, groups: list[Group], left: Collection[str], evaluation: Evaluation) -> Step:
    """With the groups named in `left` in higher precision."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tried.onnx")
        calibrated.write(file, [node for group in groups if group.name in left for node in group.nodes])
        return Step(tuple(group.name for group in groups if group.name in left), evaluation.loss(file))


def search(
    calibrated: Calibrated,
    groups: list[Group],
    always: Collection[str],
    alone: dict[str, Loss],
    evaluation: Evaluation,
    budget: float,
    known: dict[frozenset[str], Step] | None = None,
) -> list[Step]:
    """The fewest groups to leave in higher precision so that `Loss.budgeted` is at most `budget`.

    First the least number of groups, those of lowest SQNR alone before the others, is found by bisection; then each of
    them is quantised again, least harmful first, where the budget allows.

    always: names of groups that are left in any case. alone: as `sensitivities` gives it. known: steps by their groups,
    which are not measured again; filled. Returns every step that was tried; the last one holds. Its loss is above the
    budget only where leaving every group is.
    """
    known = {} if known is None else known
    others = [group.name for group in groups if group.name not in always]
    worst_first = sorted(others, key=lambda name: alone[name].sqnr_db)
    tried: list[Step] = []

    def leave(names: Collection[str]) -> Step:
        left = frozenset({*always, *names})
        if left not in known:
            known[left] = measure(calibrated, groups, left, evaluation)
        tried.append(known[left])
        return tried[-1]

    steps: dict[int, Step] = {}  # by how many of the worst are left
    low, high = 0, len(worst_first)  # the least number lies in between
    while low < high:
        count = (low + high) // 2 if steps else 0  # everything first: it is often enough
        steps[count] = leave(worst_first[:count])
        low, high = (low, count) if steps[count].loss.budgeted <= budget else (count + 1, high)
    best = steps.get(low) or leave(worst_first[:low])
    for name in reversed(worst_first[: max(low - 1, 0)]):  # without the last the budget was exceeded
        step = leave([other for other in best.left if other != name])
        if step.loss.budgeted <= budget:
            best = step
    return tried if tried[-1] == best else [*tried, best]


def settle(
    find: Callable[[float], list[Step]], loss_of: Callable[[Step], Loss], budget: float
) -> tuple[list[Step], Loss]:
    """A search whose result holds on more questions than it asked: for less than the budget, by as much as the result
    before exceeded it there, ROUNDS searches at most.

    find: searches for a budget, as `search`. loss_of: what a step costs on all questions. Returns (every step that was
    tried, the loss of the last one), which is above the budget where no round brought it below.
    """
    allowed, steps = budget, find(budget)
    loss = loss_of(steps[-1])
    for _ in range(ROUNDS - 1):
        if loss.budgeted <= budget:
            break
        allowed *= budget / loss.budgeted
        more = find(allowed)
        changed = more[-1].left != steps[-1].left
        steps += more
        if changed:
            loss = loss_of(more[-1])
    return steps, loss
