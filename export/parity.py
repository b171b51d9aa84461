"""Bundle against PyTorch, end to end, on your own images.

    python -m export.parity --checkpoint DIR --bundle DIR --image FILE... [--prompt TEXT] [--max-new-tokens N]

Both sides get the pixel values and the prompt ids that the runtime makes, so what is compared is the computation:
image embeds, the first logits, the greedy answer. Exits with 1 when a relative error exceeds its bound (that of the
bundle's precisions) or, for a float32 bundle, when an answer differs.
"""

import argparse

import numpy as np
import torch

from export import encoder as encoder_export
from export.cli import open_checkpoint, run
from export.decoder import check as decoder_check
from export.tolerances import Difference, compare, report
from runtime.backends.select import Backends
from runtime.errors import UserError
from runtime.model import Model, load
from runtime.text.template import first_turn
from runtime.types import Options, Result, Trace
from train.model import IMAGE_TOKEN_INDEX, Checkpoint, ConvLLaVA, load_model

QUANTISED = 0.3  # the least SQNR of an INT8 encoder that is of use, 10 dB, as a relative error


def compare_image(
    reference: ConvLLaVA, model: Model, image: str, prompt: str, max_new_tokens: int
) -> tuple[list[Difference], list[int], Result]:
    """(rows for the embeds and the logits, PyTorch's ids, the runtime's result) for one image and question."""
    trace = Trace()
    *_, last = model.generate([image], prompt, Options(max_new_tokens), trace)
    pixels = torch.from_numpy(trace.pixel_values[0])
    ids = model.tokenizer.encode_prompt(first_turn(model.bundle.prompt, prompt, 1), [1])
    input_ids = torch.tensor([IMAGE_TOKEN_INDEX if token < 0 else token for token in ids])
    with torch.inference_mode():
        embeds = reference.image_encoder(pixels[None])[0]
        (logits,) = reference(input_ids, [pixels])
    expected = reference.generate(input_ids, [pixels], len(last.result.token_ids), set(model.tokenizer.eos_token_ids))
    encoder_bound = encoder_export.BOUNDS.get(model.bundle.encoder.precision, QUANTISED)
    decoder_bound = max(decoder_check.BOUNDS[model.bundle.decoder.precision], encoder_bound)
    rows = [
        compare(f"{image[-26:]}: image_embeds", trace.image_embeds, embeds.numpy(), encoder_bound),
        compare(f"{image[-26:]}: first logits", trace.first_logits, logits[-1].numpy(), decoder_bound),
    ]
    return rows, expected, last.result


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="what the bundle was made from; default: the demo model")
    parser.add_argument("--bundle", help="default: the demo model's")
    parser.add_argument("--image", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--prompt", default="Describe this image.")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    args = parser.parse_args(argv)
    checkpoint = open_checkpoint(args.checkpoint)
    model = load(args.bundle, backends=Backends(encoder="onnx"))  # an engine has other bounds
    _check_same_shape(model, checkpoint)
    reference = load_model(checkpoint)
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
