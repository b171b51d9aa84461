"""Comparisons of exported graphs with PyTorch, and their tolerances; as a command, a bundle against its checkpoint.

    python -m export.parity --checkpoint DIR --bundle DIR --image FILE... [--prompt TEXT] [--max-new-tokens N]

Both sides get the pixel values and the prompt's token IDs that the runtime makes, so what is compared is the
computation: image embeddings, the first logits, the greedy answer. Exits with 1 when a relative error exceeds its
tolerance (that of the bundle's precisions) or, for a float32 bundle, when an answer differs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from runtime.backends.select import Backends
from runtime.command import run
from runtime.errors import UserError
from runtime.model import Model, load
from runtime.text.template import first_turn
from runtime.types import Options, Result, Trace

if TYPE_CHECKING:  # engines are built and validated without PyTorch
    from train.model import Checkpoint

# Largest relative error of each part's output, by its precision. Weight-only quantization has no fixed error: those
# tolerances catch a broken graph, and accuracy is for a task's questions to measure. An engine is compared with its own
# graph on ONNX Runtime: FP16 has 11 bits; a Q/DQ graph rounds the same values to the same codes, but those half-way
# between two may go either way.
TOLERANCES = {
    ("encoder", "fp32"): 1e-4,
    ("encoder", "fp16"): 5e-3,
    ("encoder", "int8"): 0.3,  # an SQNR of 10 dB, the least that is of use
    ("decoder", "fp32"): 1e-4,
    ("decoder", "fp16"): 2e-2,
    ("decoder", "int8"): 0.1,
    ("decoder", "int4"): 0.8,
    ("decoder", "w4a16"): 0.8,
    ("layer", "int8"): 0.1,  # what one layer adds to its input
    ("layer", "int4"): 0.7,
    ("layer", "w4a16"): 0.7,
    ("engine", "fp16"): 2e-2,
    ("engine", "int8"): 0.1,
    ("engine", "fp8"): 0.1,
}
CHUNK = 1 << 20  # values that are compared at once


class ParityError(Exception):
    """An exported graph does not compute what the checkpoint does; the table printed before says where."""

    exit_code = 1


@dataclass(frozen=True)
class Difference:
    """One comparison with the reference; `error` is the norm of the difference over the norm of the reference."""

    what: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        return f"{self.what:<42} {self.error:>10.2e} {self.tolerance:>10.0e}  {'ok' if self.ok else 'TOO LARGE'}"


def compare(what: str, found: npt.ArrayLike, reference: npt.ArrayLike, tolerance: float) -> Difference:
    """Compare two arrays, with sums in float64. Raises UserError where their shapes differ."""
    found, reference = np.asarray(found), np.asarray(reference)
    if found.shape != reference.shape:
        raise UserError(f"{what}: shape {found.shape}, but the reference has {reference.shape}")
    ours, theirs, difference, norm = found.ravel(), reference.ravel(), 0.0, 0.0
    for start in range(0, ours.size, CHUNK):  # hidden states are large, and need not be in memory in float64
        expected = theirs[start : start + CHUNK].astype(np.float64)
        difference += float(np.square(ours[start : start + CHUNK] - expected).sum())
        norm += float(np.square(expected).sum())
    return Difference(what, float(np.sqrt(difference)) / max(float(np.sqrt(norm)), 1e-30), tolerance)


def report(rows: list[Difference]) -> bool:
    """Print the table; True if every row is within its tolerance."""
    print(f"{'relative error against PyTorch':<42} {'found':>10} {'bound':>10}")
    print(*rows, sep="\n", flush=True)
    return all(row.ok for row in rows)


class Reference:
    """What the checkpoint computes, in PyTorch and float32, with one block or layer of it in memory."""

    def __init__(self, checkpoint: Checkpoint):
        from train.model import load_image_encoder, load_language_state
        from train.model.streamed import StreamedDecoder

        self._encoder = load_image_encoder(checkpoint, None)
        self._decoder = StreamedDecoder(checkpoint.llama_config, load_language_state(checkpoint))

    def image_embeddings(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[3, H, W] -> [T, D]."""
        import torch

        from train.model.streamed import image_embeddings

        return image_embeddings(self._encoder, torch.from_numpy(pixel_values)[None])[0].numpy()

    def answer_logits(
        self, prompt_ids: list[int], embeddings: npt.NDArray[np.float32], answer_ids: list[int]
    ) -> npt.NDArray[np.float32]:
        """Logits [N, V] of the N positions that an answer's tokens come from, given the tokens before each.

        Args:
            prompt_ids: negative ones are the image's, in order.
            embeddings: of the image, [T, D].
        """
        import torch

        ids = [*prompt_ids, *answer_ids[:-1]]
        x = self._decoder.embed([max(token, 0) for token in ids])
        x[torch.tensor(ids) < 0] = torch.from_numpy(embeddings)
        *_, last = self._decoder.hidden_states(x)
        return self._decoder.logits(last[len(prompt_ids) - 1 :]).numpy()


def compare_image(
    reference: Reference, model: Model, image: str, prompt: str, max_new_tokens: int
) -> tuple[list[Difference], list[int], Result]:
    """One image and question through PyTorch and the runtime.

    Returns:
        (rows for the image embeddings and the first logits, PyTorch's greedy token IDs, the runtime's result). The
        IDs are PyTorch's choice at each position of the runtime's answer: those behind the first that differs follow
        another text than PyTorch would have written.
    """
    trace = Trace()
    *_, last = model.generate([image], prompt, Options(max_new_tokens), trace)
    result = last.result
    assert result is not None and trace.image_embeds is not None and trace.first_logits is not None
    ids = model.tokenizer.encode_prompt(first_turn(model.bundle.prompt, prompt, 1), [len(trace.image_embeds)])
    embeddings = reference.image_embeddings(trace.pixel_values[0])
    logits = reference.answer_logits(ids, embeddings, result.token_ids)
    encoder = TOLERANCES["encoder", model.bundle.encoder.precision]
    decoder = max(TOLERANCES["decoder", model.bundle.decoder.precision], encoder)
    rows = [
        compare(f"{image[-26:]}: image_embeds", trace.image_embeds, embeddings, encoder),
        compare(f"{image[-26:]}: first logits", trace.first_logits, logits[0], decoder),
    ]
    return rows, logits.argmax(-1).tolist(), result


def _check_same_shape(model: Model, checkpoint: Checkpoint) -> None:
    """Raises UserError where a bundle cannot have been made from the checkpoint."""
    llama, decoder = checkpoint.llama_config, model.bundle.decoder
    for what, bundled, expected in (
        ("stride", model.bundle.encoder.stride, checkpoint.encoder_config.stride),
        ("hidden size", model.bundle.encoder.hidden_size, llama.hidden_size),
        ("layers", decoder.layers, llama.num_hidden_layers),
        ("vocabulary", decoder.vocab_size, llama.vocab_size),
    ):
        if bundled != expected:
            raise UserError(
                f"{model.bundle.folder} was not made from {checkpoint.folder}: its {what} is {bundled}, not {expected}"
            )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.parity", description="Compare a bundle with its checkpoint, end to end, on your images."
    )
    parser.add_argument("--checkpoint", help="what the bundle was made from; default: the demo model")
    parser.add_argument("--bundle", help="default: the demo model's")
    parser.add_argument("--image", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--prompt", default="Describe this image.")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    from export.cli import open_checkpoint

    checkpoint = open_checkpoint(args.checkpoint)
    model = load(args.bundle, backends=Backends(encoder="onnx"))  # an engine has other tolerances
    _check_same_shape(model, checkpoint)
    reference = Reference(checkpoint)
    exact = model.bundle.encoder.precision == model.bundle.decoder.precision == "fp32"
    rows, same = [], []
    for image in args.image:
        found, expected, result = compare_image(reference, model, image, args.prompt, args.max_new_tokens)
        rows += found
        agree = int(np.cumprod([a == b for a, b in zip(expected, result.token_ids, strict=False)]).sum())
        same.append(expected == result.token_ids)
        verdict = "identical" if same[-1] else f"the first {agree} of {len(expected)} ids agree"
        print(f"{image}: {len(result.token_ids)} new ids, {verdict}")
    good = report(rows)
    return 0 if good and (all(same) or not exact) else 1


if __name__ == "__main__":
    run(main)
