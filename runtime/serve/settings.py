"""What a server may be told, and what is built from it, for `python -m runtime.serve` and for Ray's replicas."""

import re
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from runtime.backends.memory_plan import Plan
from runtime.backends.select import MAX_THREADS, Backends, plan_batch
from runtime.bundle.manifest import read_bundle
from runtime.demo import demo_bundle
from runtime.errors import UserError
from runtime.image.preprocess import ImageRule
from runtime.model import Model, load
from runtime.serve.chat import ChatService
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.origins import is_host, is_origin
from runtime.serve.remote_images import Fetcher
from runtime.serve.scheduler import Scheduler
from runtime.serve.sizing import ImageSizes
from runtime.serve.vision_worker import ENCODER_NICE


class Settings(BaseModel):
    """bundle: None for the demo model's. max_batch: answers decoded at once. context: positions of a sequence.
    kv_precision: as `Backends`. What is None of these and of image_cache_bytes, `fitted` chooses. max_queue: requests
    that may wait.
    threads: of one operator. allow_remote_images: hosts, with commas between them. max_images: of a request.
    image_cache_bytes: of embeddings of images seen before. max_output: new tokens of an answer. timeout: seconds that a
    request may take. allowed_host, cors_origin: as `OriginCheck`, with commas between them. res, aspect: of images
    whose request does not choose; None takes the bundle's. enable_mm_embeds: whether clients may send embeddings."""

    model_config = ConfigDict(extra="forbid")

    bundle: str | None = None
    max_batch: PositiveInt | None = None
    context: PositiveInt | None = None
    kv_precision: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    max_queue: PositiveInt = 64
    threads: int | None = Field(default=None, ge=1, le=MAX_THREADS)
    encoder: str = "auto"
    encoder_precision: str | None = None
    decoder: Literal["auto", "onnx", "kernels", "kernels24"] = "auto"
    provider: str = "cpu"
    batch_invariant: bool = True
    allow_remote_images: str = ""
    max_images: PositiveInt = Limits.images
    max_image_bytes: PositiveInt = Limits.image_bytes
    max_image_pixels: PositiveInt = Limits.image_pixels
    image_cache_bytes: NonNegativeInt | None = None
    max_output: PositiveInt = Limits.output_tokens
    timeout: float = Field(default=Limits.seconds, gt=0, allow_inf_nan=False)
    allowed_host: str = ""
    cors_origin: str = ""
    enable_mm_embeds: bool = False
    res: PositiveInt | None = None
    aspect: Literal["pad", "any", "crop"] | None = None

    @field_validator("allow_remote_images")
    @classmethod
    def _hosts(cls, value: str) -> str:
        for host in listed(value):
            if re.search(r"[\s/]", host):
                raise ValueError(f"{host!r} is no host: example.com or example.com:8443 is expected")
        return value

    @field_validator("allowed_host")
    @classmethod
    def _names(cls, value: str) -> str:
        for name in listed(value):
            if not is_host(name):
                raise ValueError(f"{name!r} is no host without a port: example.com is expected")
        return value

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, value: str) -> str:
        for origin in listed(value):
            if not is_origin(origin):
                raise ValueError(f"{origin!r} is no origin: https://example.com or http://localhost:3000 is expected")
        return value

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Raises UserError, one line that names the option, for a value that is none."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-")
            raise UserError(f"{option}: {first['msg']}, found {first['input']!r}") from error

    @property
    def limits(self) -> Limits:
        one_image = 4 * self.max_image_bytes // 3 + (1 << 20)  # in base64, and what stands around it
        return Limits(
            body_bytes=max(Limits.body_bytes, one_image),
            image_bytes=self.max_image_bytes,
            image_pixels=self.max_image_pixels,
            images=self.max_images,
            output_tokens=self.max_output,
            seconds=self.timeout,
        )

    def sizes(self, rule: ImageRule) -> ImageSizes:
        """Of images, by the rule of the bundle. Raises UserError for a resolution that it cannot have."""
        try:
            return ImageSizes(rule, self.res, self.aspect)
        except UserError as error:
            raise UserError(f"--res {self.res}: {error}") from error

    def planned(self) -> Plan:
        """What the model's sequences and caches may take, so that all fits the memory of this machine.

        Raises UserError as `read_bundle`, `sizes`, `Backends` and `plan_batch`, and for a context longer than the
        model's.
        """
        bundle = read_bundle(self.bundle or demo_bundle())
        longest = bundle.decoder.context_length
        if self.context is not None and self.context > longest:
            raise UserError(f"--context is {self.context}, the model has {longest} positions")
        largest = self.sizes(bundle.image).largest
        return plan_batch(bundle, self._backends(), self.max_batch, self.image_cache_bytes, largest)[1]

    def fitted(self) -> tuple[Self, Plan]:
        """(these settings with everything chosen, what was chosen). Raises UserError as `planned`."""
        chosen = self.planned()
        values = {
            "max_batch": chosen.slots,
            "context": chosen.context,
            "image_cache_bytes": chosen.cache_bytes,
            "kv_precision": chosen.kv_precision if self.provider == "cpu" else self.kv_precision,
        }
        return self.model_copy(update=values), chosen

    def load(self) -> Model:
        """The model. Raises UserError as `runtime.load` and `planned`."""
        settings, _ = self.fitted()
        backends = settings._backends()
        return load(self.bundle or demo_bundle(), backends=backends, cache_bytes=settings.image_cache_bytes or 0)

    def _backends(self) -> Backends:
        return Backends(
            self.encoder,
            self.decoder,
            self.provider,
            self.encoder_precision,
            self.threads,
            ENCODER_NICE,
            self.kv_precision,
            self.context,
        )

    def service(self, model: Model, metrics: Metrics | None = None) -> ChatService:
        """A scheduler over the model, warmed up, and what begins answers on it.

        Raises UserError as `planned`, and where an encoder's engine was not built for the resolution.
        """
        slots = self.max_batch or self.planned().slots
        scheduler = Scheduler(
            model.encoder, model.decoder, model.cache, slots, self.max_queue, metrics, self.batch_invariant
        )
        hosts = listed(self.allow_remote_images)
        fetch = Fetcher(hosts, self.max_image_bytes) if hosts else None
        sizes = self.sizes(model.bundle.image)
        service = ChatService(model, scheduler, self.limits, fetch, sizes, self.enable_mm_embeds)
        service.start()
        # The first image is not to wait for what an encoder and a decoder allocate and read at their first run
        model.encoder([np.zeros((3, sizes.default.resolution, sizes.default.resolution), np.float32)])
        scheduler.warm_up()
        scheduler.start()
        return service


def listed(value: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(filter(None, value.split(",")))
