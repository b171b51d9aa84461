"""The decoder on an NVIDIA GPU at the released size, next to what a user would take instead.

    python -m benchmarks.cuda_decode [--peers NAME ...] [--precisions fp16 int4] [--prompt 640] [--steps N] [--rounds N]
                              [--layers N] [--hidden N] [--intermediate N] [--heads N] [--vocab N] [--json F]

A Llama of Vicuna-7B's shape with random weights; libraries take turns in processes of their own, as in
`benchmarks.decode`. prefill: so many image embeds (ids, where a library cannot begin with embeds) to the first token;
decode: greedy steps after a prompt as long. GenAI's 4 bits are its model builder's, ours around zero like them.
limit: the bytes of the weights, read once a step as fast as a copy of this GPU reads and writes, or a prompt's
operations as fast as its largest product in half precision.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks import record
from benchmarks.peers import genai_export
from benchmarks.peers.cuda_decoders import PEERS
from benchmarks.peers.turns import Running, compared, in_turn, same
from export.cli import BUILD
from export.decoder.export import HALF, write_fused
from runtime.bundle.manifest import DecoderPart

DTYPES = {"cuda": torch.float16, "cpu": torch.float32}
OURS = {"cuda": {"int4": "w4a16"}, "cpu": {}}  # the precision that is compared with GenAI's of that name
SPREAD = 0.02  # of the random weights
KIND = "cuda_decoders"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_decode", description=__doc__.split("\n")[0])
    known = [name for name in PEERS if name != "ours"]
    parser.add_argument("--peers", nargs="*", default=known, choices=known, help="default: all")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "int4"], choices=("fp32", "fp16", "int4"))
    parser.add_argument("--prompt", type=int, default=640, metavar="N", help="tokens")
    parser.add_argument("--steps", type=int, default=128, metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=DTYPES, help="cpu: to try it out, small and in float32")
    for name, value in (("layers", 32), ("hidden", 4096), ("intermediate", 11008), ("heads", 32), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default: {value}")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/cuda_decode.json")
    args = parser.parse_args()
    rows, limits = [], {}
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        folder = Path(scratch)
        write_random_llama(config_of(args), folder / "llama", DTYPES[args.device])
        for precision in args.precisions:
            spec = spec_of(args, folder, precision)
            # PyTorch has no 4 bits: those peers are compared with fp16 alone
            peers = [name for name in args.peers if precision != "int4" or name == "ort-genai"]
            workers = {name: Running(KIND, name, spec) for name in ("ours", *peers)}
            if args.device == "cuda" and not limits:
                limits = workers["ours"].ask("limits")
            size = sum(file.stat().st_size for file in Path(spec["graph"]).iterdir())
            for row in measured(workers, args):
                row |= {"precision": precision, "weights_gb": round(size / 1e9, 2), **limit_of(row, size, limits, args)}
                print(row, flush=True)
                rows.append(row)
            for worker in workers.values():
                worker.close()
    record.write("cuda_decode", rows, args.json, {"device": device_name(args.device), "limits": limits})


def config_of(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_id=2,
    )


def write_random_llama(config: LlamaConfig, folder: Path, dtype: torch.dtype) -> None:
    """A Hugging Face folder. The matrices are cut from one block of random numbers: the speed is what counts."""
    folder.mkdir(parents=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    block = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * SPREAD).to(dtype)
    tensors = {name: _cut(block, shape) for name, shape in _shapes(config)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    # GenAI wants a tokenizer; what it says is never read
    words = models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{at}.self_attn.{name}.weight", (hidden, hidden)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _cut(block: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    size = shape[0] * shape[1]
    return block.repeat(-(-size // len(block)))[:size].reshape(shape).clone()


def spec_of(args: argparse.Namespace, folder: Path, precision: str) -> dict:
    """What workers are told; writes the graphs, ours beside GenAI's."""
    genai, graph = folder / f"genai-{precision}", folder / f"ours-{precision}"
    if "ort-genai" in args.peers:
        genai_export.build(str(folder / "llama"), str(genai), precision, args.device)
    graph.mkdir()
    write_ours(folder / "llama", graph, config_of(args), OURS[args.device].get(precision, precision))
    random = np.random.default_rng(0)
    capacity = args.prompt + args.steps + 2
    return {
        "device": args.device,
        "threads": None,
        "llama": str(folder / "llama"),
        "genai": str(genai),
        "graph": str(graph),
        "capacity": capacity,
        "hidden": args.hidden,
        "ids": random.integers(3, args.vocab, capacity).tolist(),
    }


def write_ours(source: Path, folder: Path, config: LlamaConfig, precision: str) -> None:
    """The graph as a bundle has it. source: the folder of `write_random_llama`."""
    write_fused(config, load_file(source / "model.safetensors"), precision, folder / "model.onnx")
    head_dim = config.hidden_size // config.num_attention_heads
    part = DecoderPart(
        file="model.onnx",
        precision=precision,
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context_length=config.max_position_embeddings,
        kv_dtype="float16" if precision in HALF else "float32",
        vocab_size=config.vocab_size,
    )
    (folder / "part.json").write_text(json.dumps(asdict(part)), encoding="utf-8")


def measured(workers: dict[str, Running], args: argparse.Namespace) -> Iterator[dict]:
    """A row for each piece of work and peer; without peers, one with ours alone."""
    pieces = {"prefill": {"tokens": args.prompt}, "decode": {"context": args.prompt, "steps": args.steps}}
    for work, arguments in pieces.items():
        answers = in_turn(workers, args.rounds, work, **arguments)
        own = answers["ours"]
        for peer, other in list(answers.items())[1:] or [("", own)]:
            row = {"work": work, "peer": peer, "batch": 1, "context": args.prompt}
            if work == "prefill":
                yield row | {"metric": "ms", "same": "", **compared(own, other)}
            else:
                found = same(own[-1]["ids"], other[-1]["ids"])
                yield row | {"metric": "tokens/s", "same": found, **compared(own, other, args.steps)}


def limit_of(row: dict, size: int, limits: dict, args: argparse.Namespace) -> dict:
    """size: bytes of the weights; the embedding table, of which a step reads one row, is counted too."""
    if not limits:
        return {"limit": "", "reached": ""}
    if row["work"] == "decode":
        limit = limits["copy"] / size
        return {"limit": round(limit, 1), "reached": round(row["ours"] / limit, 3)}
    weights = args.layers * (4 * args.hidden**2 + 3 * args.hidden * args.intermediate)
    limit = 1e3 * 2 * (args.prompt * weights + args.vocab * args.hidden) / limits["product"]
    return {"limit": round(limit, 2), "reached": round(limit / row["ours"], 3)}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU, to try it out"


if __name__ == "__main__":
    main()
