"""The task of LLaVA's stages: learn the answers of conversations about images."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from runtime.image.preprocess import ImageRule
from runtime.text.template import TEMPLATES
from train.assemble import Source
from train.attention import quick_attention
from train.data.collate import ConversationBatch, collate
from train.data.dataset import Conversation, Conversations
from train.data.sampler import Sampler, micro_batches
from train.data.tokenizer import load_tokenizer
from train.distributed import World
from train.errors import CheckpointError, RecipeError, TokenizerError
from train.loop import compute_dtype
from train.lora import add_lora, go_on_from, merge_lora
from train.model import IGNORE_INDEX, Checkpoint, ConvLLaVA, load_language_state, save_state
from train.parts import check_parts, freeze_others, parameter_groups
from train.recipe import Recipe
from train.types import Loss

_OUTER = "model."  # what `AnswerLoss` puts in front of the names of a ConvLLaVA's parameters


class AnswerLoss(nn.Module):
    """A batch of conversations to the cross-entropy of its answers. Right-padded as in the original, or joined, where
    that costs less."""

    def __init__(self, model: ConvLLaVA):
        super().__init__()
        self.model = model

    def forward(self, conversations: list[Conversation]) -> tuple[Tensor, int]:
        """Returns the sum over all learnt labels of -log p(label), float32, and their number.

        A label is learnt where it is not IGNORE_INDEX, and predicted from the position before it. Logits are computed
        for those positions only: over the whole batch they would be the largest tensor by far. An empty batch has the
        sum 0, by way of one token that nothing is learnt from, so that a process without data takes part in FSDP.
        """
        embeds, labels = zip(*self._merged(conversations or [self._nothing()]), strict=True)
        # What a position predicts; the last one of a conversation nothing
        wanted = [F.pad(label[1:], (0, 1), value=IGNORE_INDEX) for label in labels]
        decoder = self.model.decoder
        lengths = [len(label) for label in labels]
        if decoder.config._attn_implementation == "sdpa" and is_cheaper_joined(lengths, decoder.config):
            inputs, mask, places = joined(embeds)
            targets = torch.cat(wanted)[None]  # [1, S]
        else:
            inputs, places = pad_sequence(list(embeds), batch_first=True), None  # [B, S, D]
            ends = torch.tensor(lengths, device=inputs.device)
            mask = (torch.arange(inputs.shape[1], device=inputs.device) < ends[:, None]).long()  # [B, S]
            targets = pad_sequence(wanted, batch_first=True, padding_value=IGNORE_INDEX)
        if isinstance(self, FSDPModule) and not inputs.requires_grad:
            inputs.requires_grad_()  # the others go back through the decoder, and every process has to
        with quick_attention(inputs.device):
            states = decoder.model(
                inputs_embeds=inputs, attention_mask=mask, position_ids=places, use_cache=False
            ).last_hidden_state
        learnt = targets != IGNORE_INDEX
        logits = decoder.lm_head(states[learnt])  # [learnt labels, V]
        return F.cross_entropy(logits.float(), targets[learnt], reduction="sum"), int(learnt.sum())

    def _merged(self, conversations: list[Conversation]) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeds [S', D] and labels [S'] of each conversation, its images in place."""
        embeds = iter(self._encode([image for conversation in conversations for image in conversation.images]))
        for conversation in conversations:
            own = [next(embeds) for _ in conversation.images]
            yield self.model.merge(conversation.input_ids, own, conversation.labels)

    def _encode(self, images: list[Tensor]) -> list[Tensor]:
        """Embeds [T, D] of each image; images of one size go through the encoder together."""
        embeds: list[Tensor | None] = [None] * len(images)
        for size in dict.fromkeys(image.shape for image in images):
            at = [i for i, image in enumerate(images) if image.shape == size]
            for i, embed in zip(at, self.model.image_encoder(torch.stack([images[i] for i in at])), strict=True):
                embeds[i] = embed
        return embeds

    def _nothing(self) -> Conversation:
        token = torch.zeros(1, dtype=torch.long, device=self.model.decoder.device)
        return Conversation(token, torch.full_like(token, IGNORE_INDEX), [], 1)


def is_cheaper_joined(lengths: Sequence[int], config: LlamaConfig) -> bool:
    """Whether sequences cost less one behind the other, each blind to the others, than side by side and padded.

    Joined there is no padding, but attention goes over all pairs of positions. By operations: in units of one pair's
    attention, 4 x hidden_size, a position's products in a layer cost `products`.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    key_value = hidden * config.num_key_value_heads // heads
    products = (2 * hidden * (2 * hidden + 2 * key_value) + 6 * hidden * config.intermediate_size) / (4 * hidden)
    total, longest = sum(lengths), max(lengths)
    return total * (products + total) < len(lengths) * longest * (products + longest)


def joined(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeds [S_i, D] one behind the other: [1, S, D], which positions each may see (bool [1, 1, S, S]: earlier ones of
    its own sequence), and each one's place in its sequence [1, S]."""
    device, lengths = embeds[0].device, [len(embed) for embed in embeds]
    places = torch.cat([torch.arange(length, device=device) for length in lengths])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    seen = (owner[:, None] == owner) & (places[:, None] >= places)
    return torch.cat(list(embeds))[None], seen[None, None], places[None]


class ConversationTask:
    """A `train.types.Task`: data from the recipe's JSON files, a ConvLLaVA, the loss of its answers."""

    def __init__(self, recipe: Recipe, world: World):
        """Raises RecipeError or CheckpointError, for what configurations alone can tell before any weight is read."""
        self._recipe, self._world = recipe, world
        self._source = source = Source.open(recipe)
        base = Checkpoint.open(recipe.lora.base) if recipe.lora and recipe.lora.base else None
        check_parts(recipe.train, len(source.encoder_config.depths), source.like.projector_type)
        self._dataset = _dataset(recipe, source)
        datasets = [(n, records.weight) for n, records in zip(self._dataset.counts, recipe.data, strict=True)]
        try:
            self._sampler = Sampler(self._dataset.lengths, datasets, recipe.global_batch, recipe.seed)
        except ValueError as error:
            raise RecipeError(f"data: {error}") from None
        self.steps_in_epoch = self._sampler.steps_in_epoch
        self.model = AnswerLoss(_trainable_model(source, base, recipe, world))
        # The loop keeps frozen weights in the type it computes in; a checkpoint gets them as they were.
        sharded = recipe.fsdp and world.size > 1  # then they are float32 anyway
        frozen = {} if sharded or not world.main else dict(self.model.named_parameters())
        self._frozen = {name: weight.data for name, weight in frozen.items() if not weight.requires_grad}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model.model, self._recipe)

    def steps(self, first: int, last: int) -> Iterator[Sequence[ConversationBatch]]:
        count = self._recipe.accumulation(self._world.size)
        while first < last:
            epoch, begin = divmod(first, self.steps_in_epoch)
            end = min(self.steps_in_epoch, begin + last - first)
            batches = iter(self._loader(epoch, begin, end, count))
            for _ in range(begin, end):
                yield [next(batches) for _ in range(count)]
            first += end - begin

    def loss(self, batch: ConversationBatch) -> Loss:
        return Loss(*self.model(batch.conversations))

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        weights = {name.removeprefix(_OUTER): tensor for name, tensor in (weights | self._frozen).items()}
        if self._recipe.lora:
            weights = merge_lora(weights, self._recipe.lora)
        save_state(weights, self._source.like, folder, self._source.stored_dtype())

    def _loader(self, epoch: int, begin: int, end: int, count: int) -> DataLoader:
        """This process's micro-batches of some steps of an epoch, in order."""
        world, size = self._world, self._recipe.micro_batch
        plan = [
            indices.tolist()
            for batch in self._sampler.epoch(epoch)[begin:end]
            for indices in micro_batches(batch, size, count, world.rank, world.size)
        ]
        return DataLoader(
            self._dataset,
            batch_sampler=plan,
            collate_fn=collate,
            num_workers=self._recipe.workers,
            generator=torch.Generator(),  # else it would draw its workers' seeds from the model's
        )


def _dataset(recipe: Recipe, source: Source) -> Conversations:
    config, like, stride = source.like.config, source.like, source.encoder_config.stride
    resolution = recipe.resolution or like.resolution
    for side in (resolution, *(records.resolution for records in recipe.data if records.resolution is not None)):
        if side < 1 or side % stride:
            below = max(side // stride, 1) * stride
            raise RecipeError(f"resolution: {side} is not a multiple of {stride}; try {below} or {below + stride}")
    if config.get("mm_use_im_start_end"):
        raise RecipeError("checkpoint: mm_use_im_start_end is set; training with marked images is not supported")
    name = config.get("conversation_template", "vicuna_v1")
    if name not in TEMPLATES:
        raise RecipeError(f"template: the checkpoint's is {name!r}; give one of {', '.join(TEMPLATES)}")
    mean, std = like.pixel_statistics
    rule = ImageRule(
        mean=mean,
        std=std,
        aspect=recipe.aspect,
        resolution=resolution,
        multiple=stride,
        max_visual_tokens=like.llama_config.max_position_embeddings // 2,  # the other half is for the text
    )
    try:
        tokenizer = load_tokenizer(like.folder)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    return Conversations(
        recipe.data,
        TEMPLATES[name],
        config.get("conversation_system"),
        tokenizer,
        rule,
        recipe.max_length,
        like.llama_config.vocab_size,
    )


def _trainable_model(source: Source, base: Checkpoint | None, recipe: Recipe, world: World) -> ConvLLaVA:
    """Loaded, with adapters (on `base`, where there is one), its frozen parts frozen, attention and checkpointing as
    the recipe says."""
    attention = _attention(recipe, world)
    model = source.load()
    freeze_others(model, recipe.train)
    if recipe.lora:
        add_lora(model.decoder, recipe.lora)
        if base:
            go_on_from(model.decoder, load_language_state(base, torch.float32), recipe.lora)
    model.decoder.set_attn_implementation(attention)
    if recipe.gradient_checkpointing:

        def contexts():  # what is computed once more is so outside of `AnswerLoss.forward`
            return nullcontext(), quick_attention(world.device)

        model.decoder.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        for stage in model.image_encoder.encoder.stages:
            stage.grad_checkpointing = True
    return model


def _attention(recipe: Recipe, world: World) -> str:
    """`auto`: FlashAttention 2 where it can run, which is on a GPU from Ampere on and in half precision only."""
    can_flash = (
        find_spec("flash_attn") is not None
        and world.device.type == "cuda"
        and torch.cuda.get_device_capability(world.device) >= (8, 0)
        and compute_dtype(recipe, world) == torch.bfloat16
    )
    if recipe.attention == "flash_attention_2" and not can_flash:
        raise RecipeError(
            "attention: flash_attention_2 needs the package flash_attn, a GPU from Ampere on, and precision bf16; take "
            "auto or sdpa"
        )
    return "flash_attention_2" if can_flash and recipe.attention != "sdpa" else "sdpa"
