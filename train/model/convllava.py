"""ConvLLaVA (arXiv 2405.15738, figure 2): image -> ConvNeXt with a fifth stage -> projector -> Llama -> text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from train.model.encoder import ConvNeXtEncoder

IMAGE_TOKEN_INDEX = -200  # stands in input_ids where an image goes
IGNORE_INDEX = -100  # a label that does not count


class ImageEncoder(nn.Module):
    """Encoder and projector: pixel_values [B, 3, H, W] -> image embeds [B, T, D], T = (H/stride)*(W/stride).

    The part of the model that becomes the bundle's encoder graph: its output is the decoder's input.
    """

    def __init__(self, encoder: ConvNeXtEncoder, projector: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.encoder(pixel_values))


class ConvLLaVA(nn.Module):
    """The whole model. `image_encoder` and `decoder` are usable alone."""

    def __init__(self, image_encoder: ImageEncoder, decoder: LlamaForCausalLM):
        super().__init__()
        self.image_encoder = image_encoder
        self.decoder = decoder

    def forward(self, input_ids: Tensor, images: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """One conversation.

        input_ids: [S] int64, IMAGE_TOKEN_INDEX where an image goes.
        images: one pixel_values [3, H, W] for each of those, in order; sizes may differ.
        labels: [S] int64, IGNORE_INDEX where a token does not count; the images' positions never do.
        Returns logits [S', V] with the images expanded (S' = S - images + visual tokens) and, with labels, the mean
        cross-entropy of predicting each label from the position before it.
        Raises ValueError when images and placeholders differ in number.
        """
        embeds = [self.image_encoder(image[None])[0] for image in images]
        inputs_embeds, expanded_labels = self.merge(input_ids, embeds, labels)
        logits = self.decoder(inputs_embeds=inputs_embeds[None]).logits[0]
        if labels is None:
            return (logits,)
        loss = F.cross_entropy(logits[:-1].float(), expanded_labels[1:], ignore_index=IGNORE_INDEX)
        return logits, loss

    def merge(
        self, input_ids: Tensor, image_embeds: list[Tensor], labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Put each image's embeds [T, D] in the place of its placeholder; returns embeds [S', D] and labels [S']."""
        at = (input_ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        if len(at) != len(image_embeds):
            raise ValueError(f"{len(at)} image placeholders in input_ids, but {len(image_embeds)} images")
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
        embed = self.decoder.get_input_embeddings()
        pieces, piece_labels, start = [], [], 0
        for position, image in zip(at, image_embeds, strict=True):
            pieces += [embed(input_ids[start:position]), image]
            piece_labels += [labels[start:position], labels.new_full((image.shape[0],), IGNORE_INDEX)]
            start = position + 1
        pieces.append(embed(input_ids[start:]))
        piece_labels.append(labels[start:])
        return torch.cat(pieces), torch.cat(piece_labels)

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, images: list[Tensor], max_new_tokens: int, eos_ids: set[int]) -> list[int]:
        """Greedy decoding of one conversation, as in `forward`: the new ids, EOS included. A reference: no batch."""
        embeds = [self.image_encoder(image[None])[0] for image in images]
        inputs_embeds, _ = self.merge(input_ids, embeds)
        step = self.decoder(inputs_embeds=inputs_embeds[None], use_cache=True, logits_to_keep=1)
        new_ids = [int(step.logits[0, -1].argmax())]
        while len(new_ids) < max_new_tokens and new_ids[-1] not in eos_ids:
            last = input_ids.new_tensor([[new_ids[-1]]])
            step = self.decoder(input_ids=last, past_key_values=step.past_key_values, use_cache=True)
            new_ids.append(int(step.logits[0, -1].argmax()))
        return new_ids
