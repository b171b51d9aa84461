"""From an image file and a question to the first token, as several users would build it, for `benchmarks.peers.worker`.

Nothing of a library is imported before its class is made, since each may live in an environment of its own.
"""

import time
from typing import Any

import numpy as np
from PIL import Image

TILE, PATCH = 336, 14  # of a ViT-L/14-336
TILES = 5  # the whole image and its quarters, as LLaVA-NeXT has it: 2,880 tokens


class Chain:
    """Image file -> image embeds -> first token.

    spec: threads; image, a file; question, another_question; before, after: ids of the prompt around the image; and of
    the image rule resolution, mean, std.
    """

    def encode(self) -> np.ndarray:
        """The image's embeds [T, D], from the file."""
        raise NotImplementedError

    def prefill(self, embeds: np.ndarray) -> int:
        """The likeliest first token of the answer."""
        raise NotImplementedError

    def first_token(self) -> dict:
        """Seconds from the file to the first token, those until the image is encoded, the token, and visual tokens."""
        begin = time.perf_counter()
        embeds = self.encode()
        encode_s = time.perf_counter() - begin
        token = self.prefill(embeds)
        return {"seconds": time.perf_counter() - begin, "encode_s": encode_s, "token": token, "tokens": len(embeds)}


class Ours(Chain):
    """The bundle through `runtime.load`, as `infer.py` has it.

    spec: also backends, options of `runtime.backends.select.Backends`; by default the encoder computes in float32 on
    ONNX Runtime, as the others have it.
    """

    def __init__(self, spec: dict[str, Any]):
        import runtime
        from runtime.backends.select import Backends

        self._spec = spec
        backends = Backends(**spec.get("backends", {"encoder": "onnx", "encoder_precision": "fp32"}))
        self._model = runtime.load(spec["bundle"], spec["threads"], backends)

    def first_token(self, image: str = "new") -> dict:
        """image: `new`; `seen`, in a call before, about another question; `held`, prefilled for another question.

        Also returns how many positions were prefilled, those of the image among them.
        """
        from runtime.image.embedding_cache import EmbeddingCache
        from runtime.types import Options

        file, question, another = (self._spec[key] for key in ("image", "question", "another_question"))
        options = Options(max_new_tokens=1)
        if image == "new":
            self._model.cache = EmbeddingCache()
        elif image == "seen":
            list(self._model.generate([file], another, options))
        about = self._model.about([file], options)
        if image == "held":
            list(about.ask(another))
        begin = time.perf_counter()
        piece = next(about.ask(question) if image == "held" else self._model.generate([file], question, options))
        seconds = time.perf_counter() - begin
        timings = piece.result.timings
        encode_s = (timings.preprocess_ms + timings.encode_ms) / 1000
        result = piece.result
        found = {"seconds": seconds, "encode_s": encode_s, "token": piece.token_id, "tokens": result.visual_tokens}
        return found | {"prefilled": result.prompt_tokens}


class OpenVinoLlamaCpp(Chain):
    """Pillow, the bundle's float32 graph on OpenVINO, llama.cpp on the GGUF: one after the other.

    spec: also hint, in what OpenVINO computes; by default bfloat16 where the processor has it.
    """

    def __init__(self, spec: dict[str, Any]):
        import openvino

        from benchmarks.peers.decoders import LlamaCpp
        from benchmarks.peers.encoders import openvino_options

        options = openvino_options({"hint": None} | spec)
        self._encoder = openvino.Core().compile_model(spec["graph"], "CPU", options)
        self._decoder, self._spec = LlamaCpp(spec), spec

    def encode(self) -> np.ndarray:
        return self._encoder([preprocessed(self._spec)])[0][0]

    def prefill(self, embeds: np.ndarray) -> int:
        self._decoder.rewind(0)
        self._decoder.prefill(self._spec["before"])
        self._decoder.prefill(None, embeds)
        return self._decoder.prefill(self._spec["after"])


class Torch(Chain):
    """The checkpoint in PyTorch and transformers, float32."""

    def __init__(self, spec: dict[str, Any]):
        from benchmarks.peers.decoders import Transformers
        from benchmarks.peers.encoders import torch_eager

        self._encode, self._decoder, self._spec = torch_eager(spec), Transformers(spec), spec

    def encode(self) -> np.ndarray:
        return self._encode(preprocessed(self._spec)[0])

    def prefill(self, embeds: np.ndarray) -> int:
        self._decoder.reserve(self._spec["capacity"])
        table = self._decoder.embeddings
        parts = [table[self._spec["before"]], embeds, table[self._spec["after"]]]
        return self._decoder.prefill(None, np.concatenate(parts))


class Released(Chain):
    """ConvNeXt-L with its fifth stage, of random weights in PyTorch, before our decoder."""

    def __init__(self, spec: dict[str, Any]):
        import torch

        torch.set_num_threads(spec["threads"])
        self._torch, self._spec = torch, spec
        self._image_encoder = released_encoder(spec["hidden"])
        self._open_decoder()

    def _open_decoder(self) -> None:
        from runtime.backends.select import Backends, open_decoder
        from runtime.bundle.manifest import open_bundle

        bundle = open_bundle(self._spec["bundle"])
        self._decoder = open_decoder(bundle, Backends(threads=self._spec["threads"]))

    def encode(self) -> np.ndarray:
        with self._torch.inference_mode():
            return self._image_encoder(self._torch.from_numpy(preprocessed(self._spec)))[0].numpy()

    def prefill(self, embeds: np.ndarray) -> int:
        ids = [*self._spec["before"], *range(-1, -1 - len(embeds), -1), *self._spec["after"]]
        return self._decoder.start(len(ids)).forward_greedy(ids, embeds)


def released_encoder(hidden: int) -> Any:
    """ConvNeXt-L with its fifth stage and a projector to `hidden`, of random weights, in PyTorch."""
    from train.model import ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector

    config = EncoderConfig.from_variant("large", (6, 3072), layer_scale=0.5)
    return ImageEncoder(ConvNeXtEncoder(config), build_projector("mlp2x_gelu", config.widths[-1], hidden)).eval()


class VitTiles(Released):
    """CLIP's ViT-L/14-336 on the image and its quarters, all of them but the last layer, of random weights in PyTorch,
    before the same decoder."""

    def __init__(self, spec: dict[str, Any]):
        import timm
        import torch

        from train.model import build_projector

        torch.set_num_threads(spec["threads"])
        self._torch, self._spec = torch, spec | {"resolution": 2 * TILE}
        self._vit = timm.create_model("vit_large_patch14_clip_336", num_classes=0).eval()
        self._last = len(self._vit.blocks) - 2
        self._projector = build_projector("mlp2x_gelu", self._vit.embed_dim, spec["hidden"]).eval()
        self._open_decoder()

    def encode(self) -> np.ndarray:
        torch = self._torch
        whole = torch.from_numpy(preprocessed(self._spec | {"resolution": TILE}))
        large = torch.from_numpy(preprocessed(self._spec))
        quarters = [large[:, :, y : y + TILE, x : x + TILE] for y in (0, TILE) for x in (0, TILE)]
        with torch.inference_mode():
            found = self._vit.forward_intermediates(
                torch.cat([whole, *quarters]), indices=[self._last], output_fmt="NLC", intermediates_only=True
            )
            return self._projector(found[0]).flatten(0, 1).numpy()


def preprocessed(spec: dict[str, Any]) -> np.ndarray:
    """[1, 3, R, R] float32: padded to a square with the mean colour, resized, normalised; with Pillow and numpy."""
    image = Image.open(spec["image"]).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in spec["mean"]))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = square.resize((spec["resolution"],) * 2, Image.Resampling.BICUBIC)
    mean, std = (np.array(spec[key], np.float32) for key in ("mean", "std"))
    values = (np.asarray(resized, np.float32) / 255 - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


PEERS = {
    "ours": Ours,
    "openvino+llama.cpp": OpenVinoLlamaCpp,
    "torch+transformers": Torch,
    "convnext-l": Released,
    "vit-l-tiles": VitTiles,
}


def start(name: str, spec: dict[str, Any]) -> Chain:
    return PEERS[name](spec)
