"""Logits of an exported decoder against PyTorch's."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from export.decoder.export import decoder_part
from export.parity import TOLERANCES, Difference, compare
from runtime import kernels
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_portable import PortableSequence
from train.model import Checkpoint, load_language_state


def check_decoder(checkpoint: Checkpoint, file: Path, precision: str, graph: str = "fused") -> list[Difference]:
    """Logits of the graph against PyTorch's: a prompt with two images, a second turn, three single steps.

    graph: fused, portable or kernels (a fused one with the operators of `runtime.kernels`).

    PyTorch computes in float32 for a float32 graph, else in the checkpoint's own type, which the tolerances leave room
    for: a 7B stored in float16 then needs 14 GB here instead of 27.
    """
    random = np.random.default_rng(0)
    state = load_language_state(checkpoint, torch.float32 if precision == "fp32" else None)
    dtype = state["model.embed_tokens.weight"].dtype
    llama = LlamaForCausalLM.from_pretrained(None, config=checkpoint.llama_config, state_dict=state, dtype=dtype)
    table = state["model.embed_tokens.weight"].float().numpy()  # [vocab, hidden]
    images = (random.standard_normal((9, table.shape[1])) * table.std()).astype(np.float32)
    tokens = random.integers(3, len(table), 16).tolist()
    calls = {
        "prompt with two images": [*tokens[:4], *range(-1, -6, -1), *tokens[4:6], *range(-6, -10, -1), *tokens[6:9]],
        "second turn": tokens[9:13],
        "step 1": [tokens[13]],
        "step 2": [tokens[14]],
        "step 3": [tokens[15]],
    }
    tolerance = TOLERANCES["decoder", precision]
    part = decoder_part(checkpoint, precision, file.name)
    if graph == "portable":
        forward = PortableSequence(file).forward
    else:
        forward = OnnxDecoder(file, part, operators=kernels.library() if graph == "kernels" else None).start(64).forward
    rows, past = [], None
    for what, ids in calls.items():
        embeds = np.stack([table[i] if i >= 0 else images[-1 - i] for i in ids])
        with torch.inference_mode():
            reference = llama(
                inputs_embeds=torch.from_numpy(embeds)[None].to(dtype), past_key_values=past, use_cache=True
            )
        past = reference.past_key_values
        found = forward(ids, images if min(ids) < 0 else None)
        expected = reference.logits[0, -1].float()
        rows.append(compare(f"{graph} {precision} logits, {what}", found, expected, tolerance))
    return rows
