"""The fused decoder graph by ONNX Runtime GenAI's model builder."""

import contextlib
import io
import sys
import warnings
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from runtime.errors import UserError
from train.model import Checkpoint, load_language_state
from train.model.checkpoint.tensors import save_tensors

# precision -> builder's precision and execution provider. fp16 is written for CUDA, the provider that computes in it;
# on a CPU ONNX Runtime runs the same graph by way of float32. The builder rounds to 4 bits by itself: ONNX Runtime's
# quick products on a GPU have no offsets as `export.graphs.matmul_nbits` has them.
BUILDER = {"fp32": ("fp32", "cpu"), "fp16": ("fp16", "cuda"), "w4a16": ("int4", "cuda")}


def write_llama(checkpoint: Checkpoint, folder: Path) -> None:
    """The language model alone as a Hugging Face folder, which is what both exporters read."""
    folder.mkdir(parents=True)
    config = checkpoint.llama_config
    config.architectures = ["LlamaForCausalLM"]
    if scale := position_scale(checkpoint):
        config.rope_position_scale = scale  # the model builder's word for linear scaling
    state = {key: tensor.contiguous() for key, tensor in load_language_state(checkpoint).items()}
    config.dtype = next(iter(state.values())).dtype
    config.save_pretrained(folder)
    save_tensors(state, folder / "model.safetensors")
    # The builder needs some tokenizer; the real one is exported by export.tokenizer
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)


def position_scale(checkpoint: Checkpoint) -> float | None:
    """What linear rotary scaling multiplies positions by; None where there is none, or the exporters know it.

    Raises UserError for a kind that the graphs cannot have: dynamic scaling depends on the length reached.
    """
    scaling = checkpoint.config.get("rope_scaling") or checkpoint.config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return 1 / scaling["factor"]
    if kind not in ("default", "llama3"):
        raise UserError(
            f"{checkpoint.folder / 'config.json'}: rotary scaling {kind!r} cannot be exported, "
            "expected none, linear or llama3"
        )
    return None


def run_builder(source: Path, out: Path, precision: str) -> None:
    try:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError as error:
        raise UserError(f"--graph fused needs onnxruntime-genai, whose import failed: {error}") from error
    paths = ("llama", str(source), str(out), *BUILDER[precision], str(source.parent / "cache"))
    options = parse_extra_options(*paths, ["prune_lm_head=true"])
    create_model(*paths, **options)


def quietly(build, *arguments) -> None:
    """Run an exporter without its chatter; what it said comes out only if it fails."""
    said, verbosity = io.StringIO(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its handler keeps the real stderr
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(*arguments)
    except UserError:
        raise
    except Exception:
        print(said.getvalue(), file=sys.stderr)
        raise
    finally:
        transformers_logging.set_verbosity(verbosity)
