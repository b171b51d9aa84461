"""One image of a request: opened, sized, hashed, preprocessed when needed."""

from collections.abc import Collection, Hashable
from functools import cached_property

import numpy as np

from runtime.image.decode import MAX_PIXELS, open_image
from runtime.image.preprocess import ImageRule, digest, normalised, resized, target_size
from runtime.types import ImageSource, Options


class ImageInput:
    """An opened image and how it is to be sized.

    Attributes:
        tokens: visual tokens that it becomes.
    """

    def __init__(
        self,
        source: ImageSource,
        rule: ImageRule,
        options: Options,
        max_pixels: int = MAX_PIXELS,
        formats: Collection[str] | None = None,
    ):
        """Open the image; its pixel values are computed when they are asked for.

        Args:
            source: file, bytes or PIL image.
            rule: of the bundle.
            options: `resolution` and `aspect` override the rule's.
            max_pixels: the most that an image may have.
            formats: as Pillow calls those that are taken; None takes all.

        Raises:
            UserError: the image cannot be opened or sized.
        """
        self._rule, self._sizing = rule, (options.resolution, options.aspect)
        self._image = open_image(source, max_pixels, formats)
        height, width = target_size(*self._image.size, rule, *self._sizing)
        self.tokens = rule.tokens(height, width)

    @cached_property
    def key(self) -> Hashable:
        """Equal for images with equal pixel values."""
        return digest(self._resized)

    @cached_property
    def pixel_values(self) -> np.ndarray:
        """float32 [3, H, W]."""
        return normalised(self._resized, self._rule)

    @cached_property
    def _resized(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return resized(self._image, self._rule, *self._sizing)
