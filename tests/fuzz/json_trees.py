"""JSON that is changed as a tree: bytes changed at random are mostly no JSON."""

import copy
import json
import random
from typing import Any

# What readers trip over: limits of number types, other types, keys and texts with odd characters
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 64, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "\n",
        "\0",
        "\ud800",
        "\u2028",
        "../x",
        "/",
        ".",
        "0",
        "<image>",
        "{prompt}",
    ),
    *([], {}, [[]], [None], [1, 2, 3], {"": None}, {"a\nb": 1}, "x" * 300, [0] * 300),
]


def changed(content: bytes, seed: int) -> bytes | None:
    """JSON with one to three changes; None where it cannot be parsed or written."""
    chance = random.Random(seed)
    try:
        tree = json.loads(content)
        for _ in range(chance.choice([1, 1, 2, 3])):
            tree = _changed(tree, chance)
        return json.dumps(tree, ensure_ascii=chance.random() < 0.8).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def _changed(tree: Any, chance: random.Random) -> Any:
    if isinstance(tree, dict | list) and tree and chance.random() < 0.8:
        key = chance.choice([*tree] if isinstance(tree, dict) else range(len(tree)))
        action = chance.random()
        if action < 0.7:
            tree[key] = _changed(tree[key], chance)
        elif action < 0.8:
            del tree[key]
        elif isinstance(tree, list):
            tree.insert(key, copy.deepcopy(chance.choice([*tree, *VALUES])))
        else:
            tree[chance.choice([*tree, "a", "", "a\nb", "__proto__"])] = copy.deepcopy(
                chance.choice([*tree.values(), *VALUES])
            )
        return tree
    if isinstance(tree, str) and tree and chance.random() < 0.5:
        at = chance.randrange(len(tree) + 1)
        return (
            tree[:at]
            + chance.choice(["", "\n", "\0", "\ud800", "é", "<image>", tree])
            + tree[chance.randrange(at, len(tree) + 1) :]
        )
    if isinstance(tree, int) and not isinstance(tree, bool) and chance.random() < 0.5:
        return tree + chance.choice([-1, 1, -tree, tree, 1 << chance.randrange(64)])
    return copy.deepcopy(chance.choice(VALUES))
