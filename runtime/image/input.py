"""One image of a request: opened, sized, hashed, preprocessed when needed."""

from collections.abc import Collection, Hashable
from functools import cached_property
from typing import Any

import numpy as np

from runtime.device.memory import Array
from runtime.image.decode import MAX_PIXELS, open_image
from runtime.image.embedding_cache import digest
from runtime.image.preprocess import preprocess, target_size
from runtime.types import ImageSource, Options


class Picture:
    """An opened image and how it is to be sized. tokens: visual ones that it will be. embeds: None until it has been
    `condense`d and the model's cache had them.

    Raises UserError for what cannot be opened or sized.
    """

    embeds: Array | None = None

    def __init__(
        self,
        model: Any,
        source: ImageSource,
        options: Options,
        max_pixels: int = MAX_PIXELS,
        formats: Collection[str] | None = None,
    ):
        self._model = model
        self._rule, self._sizing = model.bundle.image, (options.resolution, options.aspect)
        self.image = open_image(source, max_pixels, formats)
        height, width = target_size(*self.image.size, self._rule, *self._sizing)
        self.tokens = height // self._rule.multiple * (width // self._rule.multiple)

    @cached_property
    def key(self) -> Hashable:
        """Of its embeds in the model's cache."""
        resolution, aspect = self._sizing
        sizing = (resolution or self._rule.resolution, aspect or self._rule.aspect)
        return self._model.encoder, *sizing, digest(self.image)

    @cached_property
    def pixel_values(self) -> np.ndarray:
        """float32 [3, H, W]."""
        return preprocess(self.image, self._rule, *self._sizing)

    def condense(self) -> None:
        """Keep no more than is needed: the embeds, where the model's cache has them, or else whichever is smaller, the
        image or its pixel values."""
        self.embeds = self._model.cache.get(self.key)
        width, height = self.image.size
        if self.embeds is None:
            if 4 * width * height <= 12 * self.tokens * self._rule.multiple**2:  # Pillow has four bytes a pixel
                return
            _ = self.pixel_values
        self.image = None
