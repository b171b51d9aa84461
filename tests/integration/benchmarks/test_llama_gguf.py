"""GGUF files as llama.cpp reads them: transformers' own reader, which undoes its layout, finds the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.peers.llama_gguf import write_gguf, write_graph_of
from export.decoder.export import decoder_part, export_decoder
from runtime.backends.ort_decoder import OnnxDecoder
from tests.support.checkpoints import GQA, TIED, Parts
from train.model import Checkpoint, load_language_state


@pytest.mark.parametrize("llama", [{}, GQA, TIED], ids=["mha", "gqa", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_the_same_weights(llama: dict, dtype: torch.dtype, tmp_path: Path):
    parts = Parts(**llama)
    for parameter in parts.decoder.parameters():
        parameter.data = parameter.data.to(dtype)
    checkpoint = Checkpoint.open(parts.write(tmp_path / "checkpoint"))
    write_gguf(checkpoint, tmp_path / "model.gguf")
    found = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    state = found.state_dict()
    for key, tensor in load_language_state(checkpoint).items():
        expected = tensor.to(torch.float16) if tensor.ndim > 1 else tensor
        assert torch.equal(state[key], expected.float()), key
    assert found.config.num_key_value_heads == checkpoint.llama_config.num_key_value_heads
    assert found.config.tie_word_embeddings == bool(llama == TIED)


def test_a_gguf_s_weights_in_our_graph_give_the_checkpoint_s_logits(conformance: Path, tmp_path: Path):
    """The conformance checkpoint is in float16, so that its GGUF holds the same numbers."""
    checkpoint = Checkpoint.open(conformance / "checkpoint")
    write_gguf(checkpoint, tmp_path / "model.gguf")
    write_graph_of(tmp_path / "model.gguf", checkpoint, tmp_path / "model.onnx")
    ids, part = [1, 30, 41, 5], decoder_part(checkpoint, "fp32", "model.onnx")
    expected = OnnxDecoder(export_decoder(checkpoint, tmp_path / "ours", "fp32"), part).start(8).forward(ids)
    found = OnnxDecoder(tmp_path / "model.onnx", part).start(8).forward(ids)
    assert np.array_equal(found, expected)
