"""Conversations to a batch, still apart: padding happens where images have become embeds."""

from dataclasses import dataclass, replace

import torch

from train.data.dataset import Conversation
from train.types import Skipped


@dataclass(frozen=True)
class ConversationBatch:
    """The conversations of one forward pass, and what was skipped on the way; see `train.types.Batch`."""

    conversations: list[Conversation]
    skipped: list[Skipped]

    @property
    def samples(self) -> int:
        return len(self.conversations)

    @property
    def images(self) -> int:
        return sum(len(conversation.images) for conversation in self.conversations)

    @property
    def tokens(self) -> int:
        """Positions, visual tokens included, padding not."""
        return sum(conversation.positions for conversation in self.conversations)

    def to(self, device: torch.device) -> "ConversationBatch":
        moved = [
            replace(
                conversation,
                input_ids=conversation.input_ids.to(device),
                labels=conversation.labels.to(device),
                images=[image.to(device) for image in conversation.images],
            )
            for conversation in self.conversations
        ]
        return replace(self, conversations=moved)


def collate(items: list[Conversation | Skipped]) -> ConversationBatch:
    return ConversationBatch(
        [item for item in items if isinstance(item, Conversation)],
        [item for item in items if isinstance(item, Skipped)],
    )
