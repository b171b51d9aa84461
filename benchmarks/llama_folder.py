"""A checkpoint's language model alone as a Hugging Face folder, which other exporters read."""

from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from train.model import Checkpoint, load_language_state
from train.model.checkpoint.tensors import save_tensors


def write_llama(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the configuration, the weights and a tokenizer that knows nothing, which exporters ask for."""
    folder.mkdir(parents=True)
    config = checkpoint.llama_config
    config.architectures = ["LlamaForCausalLM"]
    state = {key: tensor.contiguous() for key, tensor in load_language_state(checkpoint).items()}
    config.dtype = next(iter(state.values())).dtype
    config.save_pretrained(folder)
    save_tensors(state, folder / "model.safetensors")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)
