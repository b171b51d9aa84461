"""A training run as a YAML file: read, overridden from the command line, checked before anything is loaded.

    python -m train recipe.yaml out=runs/first learning_rate=1e-4 lora.rank=8

Paths in a recipe are relative to the folder the command runs in, as they are on the command line.
"""

import difflib
import math
import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from runtime.text.template import TEMPLATES
from train.errors import RecipeError

TASKS = ("conversation", "local", "align")
ASPECTS = ("pad", "any")
PRECISIONS = ("auto", "fp32", "bf16")
ATTENTIONS = ("auto", "sdpa", "flash_attention_2")
PARTS = ("projector", "fifth_stage", "encoder.stages.N", "encoder", "language_model")  # see `train.parts`
FROM_STAGE = re.compile(r"encoder\.stages\.(\d+)")
# What tasks on rendered documents do not look at
CONVERSATION_KEYS = (
    *("data", "resolution", "aspect", "template", "system", "max_length"),
    *("gradient_checkpointing", "attention"),
)
# Keys that may differ between the run that wrote a checkpoint and the one that goes on from it: they decide how fast a
# run is and what it leaves behind, not what it computes. The second line changes the order of additions, thus the last
# bits, which values dropout drops, and what a cell is told apart from (`local.contrast`); whoever runs out of memory
# has to be able to go on
HARMLESS = frozenset(
    {"out", "log_every", "save_every", "keep", "workers", "malformed_limit"}
    | {"micro_batch", "fsdp", "gradient_checkpointing"}
)

T = TypeVar("T")


@dataclass(frozen=True)
class Encoder:
    """Where a new model's ConvNeXt comes from; exactly one of the first three.

    pretrained: folder or Hub id of a Hugging Face ConvNeXt, of four stages or of five.
    timm: name of a ConvNeXt in timm, with timm's weights, such as `convnext_large_mlp.clip_laion2b_ft_320`.
    variant: a name in `train.model.VARIANTS`; weights drawn from `seed`.
    fifth_stage: [blocks, channels] of a new fifth stage behind the four, or null for none.
    layer_scale: initial layer scale of what is drawn from `seed`; None: 1e-6, or that of the stages before it.
    """

    pretrained: str | None = None
    timm: str | None = None
    variant: str | None = None
    fifth_stage: tuple[int, int] | None = None
    layer_scale: float | None = None


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the language model's linear layers (arXiv 2106.09685), in place of its own weights.

    targets: names of the layers, as peft's `target_modules`. base: a checkpoint, whose language model the adapters lie
    on; they begin as what the recipe's `checkpoint` has beyond it, so that the adapters of a run before go on. None: on
    that of `checkpoint`, and they begin as nothing.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    base: str | None = None

    def __post_init__(self):
        _at_least("lora.rank", self.rank, 1)
        _more_than_nothing("lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"lora.dropout: {self.dropout}, expected a share, 0 to less than 1")


@dataclass(frozen=True)
class Records:
    """One dataset of conversations.

    records: LLaVA's JSON, a list, or JSON lines. images: the folder that its image paths are relative to.
    weight: how often an epoch goes through it; 0.5 is a half, drawn anew each epoch, and 2.5 is twice and a half.
    resolution: side of its images, pixels; None: the recipe's.
    """

    records: str
    images: str | None = None
    weight: float = 1.0
    resolution: int | None = None

    def __post_init__(self):
        _more_than_nothing(f"data: {self.records}: weight", self.weight)
        _at_least(f"data: {self.records}: resolution", self.resolution, 1)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    out: folder of the run: checkpoints, log, curve.
    task: `conversation`; or, on rendered documents as the section `local` says: `local`, classifiers of characters on
        the encoder's stages (`train.local`), or `align`, visual tokens fitted to the embeddings of the text they cover
        (`train.align`).

    checkpoint: the model to start from, folder or Hub id in the released layout; or else its parts:
    language_model: folder or Hub id of a Llama; encoder: see `Encoder`; projector: `mlp2x_gelu`, `linear`, ...

    train: the parts to train: `projector`, `fifth_stage`, `encoder`, `encoder.stages.N`, `language_model`; see
        `train.parts`.
    learning_rates: by part, where one differs from `learning_rate`.
    lora: adapters instead of the language model's own weights.

    data: the conversations. resolution: side of the images, pixels; None: the checkpoint's. aspect: `pad` or `any`.
    template, system: of the prompts; None: the checkpoint's own, else `vicuna_v1`'s. max_length: positions of a
        sequence, visual tokens included; a longer conversation is cut at its end.
    malformed_limit: how many records may be skipped for what is wrong with them.

    global_batch: records of an optimiser step, over all processes. micro_batch: records of one forward pass.
    epochs or steps: exactly one of the two.
    warmup_ratio: share of the steps in which the learning rate rises from 0, before its cosine to 0.
    weight_decay: AdamW's, on matrices and kernels. max_grad_norm: what gradients are scaled down to.

    precision: `bf16` computes in bfloat16 (autocast) with float32 weights where they are trained; `auto` is bf16
        where a GPU has it, else fp32.
    attention: `auto` is FlashAttention 2 where it is installed and there is a GPU that computes in bf16, else SDPA.
    fsdp: shard the language model's weights, gradients and optimiser over the processes (torch's fully_shard); each
        still reads all weights into main memory first.
    save_every: steps between checkpoints. keep: newest ones that stay. workers: processes that read data, for each
        training process.
    """

    out: str
    train: tuple[str, ...]
    learning_rate: float
    global_batch: int
    micro_batch: int
    task: str = "conversation"
    checkpoint: str | None = None
    language_model: str | None = None
    encoder: Encoder | None = None
    projector: str = "mlp2x_gelu"
    learning_rates: dict[str, float] = field(default_factory=dict)
    lora: Lora | None = None
    data: tuple[Records, ...] = ()
    local: dict[str, Any] = field(default_factory=dict)
    resolution: int | None = None
    aspect: str = "pad"
    template: str | None = None
    system: str | None = None
    max_length: int = 2048
    malformed_limit: int = 100
    epochs: float | None = None
    steps: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    attention: str = "auto"
    fsdp: bool = False
    save_every: int = 500
    keep: int = 2
    log_every: int = 1
    workers: int = 2
    seed: int = 0

    def __post_init__(self):
        for key, choices in (
            ("task", TASKS),
            ("aspect", ASPECTS),
            ("precision", PRECISIONS),
            ("attention", ATTENTIONS),
            ("template", (*TEMPLATES, None)),
        ):
            if (value := getattr(self, key)) not in choices:
                raise RecipeError(f"{key}: {value!r}, expected one of {', '.join(map(str, choices))}")
        for key in ("global_batch", "micro_batch", "resolution", "max_length", "save_every", "keep", "log_every"):
            _at_least(key, getattr(self, key), 1)
        for key in ("steps", "workers", "malformed_limit", "seed", "weight_decay", "learning_rate"):
            _at_least(key, getattr(self, key), 0)
        for part, rate in self.learning_rates.items():
            _at_least(f"learning_rates.{part}", rate, 0)
        if not self.max_grad_norm > 0:  # without end, nothing is scaled down
            raise RecipeError(f"max_grad_norm: {self.max_grad_norm}, expected more than 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise RecipeError(f"warmup_ratio: {self.warmup_ratio}, expected a share of the steps, 0 to 1")
        if (self.epochs is None) == (self.steps is None):
            raise RecipeError("epochs, steps: expected exactly one of the two")
        if self.epochs is not None:
            _more_than_nothing("epochs", self.epochs)
        self._check_model()
        self._check_parts()
        self._check_unused()

    def _check_model(self) -> None:
        if self.checkpoint is not None and (self.encoder or self.language_model):
            raise RecipeError("checkpoint: has an encoder and a language_model; remove it, or those two keys")
        if self.checkpoint is None and not (self.encoder and self.language_model):
            raise RecipeError("checkpoint: missing; give one to start from, or both encoder and language_model")
        if self.checkpoint is not None and self.projector != Recipe.projector:
            raise RecipeError(f"projector: {self.projector}, but checkpoint has one; remove the key")
        if self.encoder:
            given = [key for key in ("pretrained", "timm", "variant") if getattr(self.encoder, key)]
            if len(given) != 1:
                found = " and ".join(given) or "none"
                raise RecipeError(f"encoder: expected exactly one of pretrained, timm and variant, found {found}")
        if self.task != "conversation" and self.checkpoint is None:
            raise RecipeError(f"checkpoint: missing; task {self.task} starts from one, not from its parts")
        if self.task != "conversation" and self.steps is None:
            raise RecipeError(f"epochs: {self.epochs}, but the data of task {self.task} has no end; give steps instead")
        if self.task == "conversation" and not self.data:
            raise RecipeError("data: missing; expected a list of records and images")

    def _check_parts(self) -> None:
        if not self.train:
            raise RecipeError("train: no parts, so that nothing would change")
        for part in self.train:
            if part == "encoder.stages.N" or not (part in PARTS or FROM_STAGE.fullmatch(part)):
                near = difflib.get_close_matches(part, PARTS, n=1, cutoff=0.0)[0]
                raise RecipeError(f"train: unknown part {part}; the nearest is {near}")
        for part in self.learning_rates:
            if part not in self.train:
                raise RecipeError(
                    f"learning_rates.{part}: {part} is frozen, as train has only {', '.join(self.train)}; add it there "
                    "or remove its rate"
                )
        if self.lora and "language_model" not in self.train:
            raise RecipeError(
                "lora: its adapters belong to language_model, which is frozen; add language_model to train or remove "
                "lora"
            )

    def _check_unused(self) -> None:
        """Raises RecipeError for a key that the task would not look at."""
        if self.task == "conversation":
            if self.local:
                raise RecipeError("local: is for the tasks local and align; task conversation takes its data from data")
            return
        defaults = {entry.name: entry.default for entry in fields(Recipe)}
        for key in CONVERSATION_KEYS:
            if getattr(self, key) != defaults[key]:
                raise RecipeError(f"{key}: is for task conversation, task {self.task} does not look at it; remove it")

    def accumulation(self, processes: int) -> int:
        """Micro-batches of a process in a step. Raises RecipeError where the batch does not divide."""
        at_once = self.micro_batch * processes
        if self.global_batch % at_once:
            raise RecipeError(
                f"global_batch: {self.global_batch} is not a multiple of {at_once}, which {processes} process(es) with "
                f"micro_batch {self.micro_batch} take at once"
            )
        return self.global_batch // at_once

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return _plain(asdict(self))


def read_recipe(file: str | Path, overrides: list[str] = ()) -> Recipe:
    """The recipe in `file` with `key=value` overrides; keys may be dotted (`lora.rank=8`), values are YAML.

    Raises RecipeError for a file that cannot be read, an unknown key (naming the nearest), a value of the wrong type,
    a missing key, or values that do not go together.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: expected keys and values, found {_name_of(content)}")
    for override in overrides:
        _override(content, override)
    return build(Recipe, content)


def build(cls: type[T], content: dict[str, Any], where: str = "") -> T:
    """A dataclass from plain YAML types, checked against its annotations. `where` stands before keys in messages.

    Raises RecipeError for an unknown key, a wrong type or a missing key.
    """
    hints = get_type_hints(cls)
    names = [entry.name for entry in fields(cls)]
    for key in content:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
            raise RecipeError(f"{where}{key}: unknown key; the nearest is {where}{near[0]}")
    for entry in fields(cls):
        if entry.name not in content and entry.default is MISSING and entry.default_factory is MISSING:
            raise RecipeError(f"{where}{entry.name}: missing")
    return cls(**{key: _convert(value, hints[key], f"{where}{key}") for key, value in content.items()})


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Top-level keys in which two recipes (`to_dict`) differ, but for the harmless ones.

    A key that one of them lacks has its default there: the recipe may have been written before there was such a key.
    """
    defaults = {entry.name: _plain(entry.default) for entry in fields(Recipe) if entry.default is not MISSING}
    old, new = defaults | old, defaults | new
    return sorted(key for key in old.keys() | new.keys() if key not in HARMLESS and old.get(key) != new.get(key))


def _at_least(key: str, value: float | None, least: int) -> None:
    if value is not None and not least <= value < math.inf:
        finite = "" if math.isfinite(value) else "a finite number, "
        raise RecipeError(f"{key}: {value}, expected {finite}at least {least}")


def _more_than_nothing(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        finite = "" if math.isfinite(value) else "a finite number, "
        raise RecipeError(f"{key}: {value}, expected {finite}more than 0")


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override}: expected key=value")
    *sections, last = key.split(".")
    # A part's name has dots of its own
    if sections and sections[0] == "learning_rates":
        sections, last = sections[:1], ".".join([*sections[1:], last])
    for depth, section in enumerate(sections):
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise RecipeError(f"{override}: {'.'.join(sections[: depth + 1])} has no keys; it is {_name_of(content)}")
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override}: not YAML: {' '.join(str(error).split())}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, next(a for a in arguments if a is not type(None)), where)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(where, "keys and values", value)
        return build(hint, value, f"{where}.")
    if origin is tuple:
        return _convert_list(value, arguments, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "keys and values", value)
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float:
        return _convert_float(value, where)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(where, {int: "a whole number", str: "text", bool: "true or false"}[hint], value)
    return value


def _convert_list(value: Any, items: tuple[Any, ...], where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    if items[-1] is not Ellipsis and len(items) != len(value):
        raise _wrong(where, f"a list of {len(items)}", value)
    return tuple(_convert(item, items[0], f"{where}[{index}]") for index, item in enumerate(value))


def _convert_float(value: Any, where: str) -> float:
    """YAML 1.1 reads 3e-4, which lacks a dot, as text."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise _wrong(where, "a number", value)


def _wrong(where: str, expected: str, value: Any) -> RecipeError:
    return RecipeError(f"{where}: expected {expected}, found {_name_of(value)}")


def _name_of(value: Any) -> str:
    kind = {dict: "keys and values", list: "a list", type(None): "nothing"}.get(type(value))
    return kind or repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
