"""At which resolution and aspect mode the images of requests are sized."""

from dataclasses import dataclass, replace

from runtime.errors import UserError
from runtime.image.preprocess import ImageRule
from runtime.serve.protocol import ApiError

LOW_DETAIL_RESOLUTION = 768  # pixels; the lowest that ConvLLaVA was released for


@dataclass(frozen=True)
class Sizing:
    """As `ImageRule` has them. resolution: pixels."""

    resolution: int
    aspect: str


class ImageSizes:
    """What a server offers, and what it takes where a request says nothing.

    Attributes:
        default: where a request says nothing.
        largest: resolution that a request may ask for: the bundle's or the server's, which memory is planned for.
    """

    def __init__(self, rule: ImageRule, resolution: int | None = None, aspect: str | None = None):
        """
        Args:
            rule: of the bundle.
            resolution, aspect: the server's; None takes the bundle's.

        Raises:
            UserError: the rule cannot have them.
        """
        served = replace(rule, resolution=resolution or rule.resolution, aspect=aspect or rule.aspect)
        self.default = Sizing(served.resolution, served.aspect)
        self.largest = max(rule.resolution, served.resolution)
        self._rule = rule

    def of(self, detail: str | None = None, resolution: int | None = None, aspect: str | None = None) -> Sizing:
        """How an image of a request is sized.

        Args:
            detail: of OpenAI's image parts. `low` is 768 pixels or the server's resolution where that is lower, `high`
                the bundle's resolution, anything else the server's.
            resolution, aspect: that the request asks for by name; they come before `detail`.

        Raises:
            ApiError: 400 for what this server does not offer; it says what it does.
        """
        if resolution is None:
            low = max(LOW_DETAIL_RESOLUTION // self._rule.multiple, 1) * self._rule.multiple
            named = {"low": min(low, self.default.resolution), "high": self._rule.resolution}
            resolution = named.get(detail or "auto", self.default.resolution)
        elif resolution > self.largest or resolution % self._rule.multiple or resolution < 1:
            step = self._rule.multiple
            message = f"res is {resolution}, this server takes multiples of {step} from {step} to {self.largest}"
            raise ApiError(400, message, param="mm_processor_kwargs.res", code="unsupported_resolution")
        try:
            served = replace(self._rule, aspect=aspect or self.default.aspect)
        except UserError as error:
            raise ApiError(400, str(error), param="mm_processor_kwargs.aspect") from error
        return Sizing(resolution, served.aspect)
