"""The forward pass with one block in memory gives what the whole model does."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.model import Checkpoint, load_image_encoder, load_model
from train.model.streamed import StreamedDecoder, image_embeddings


def test_image_embeddings_block_by_block(conformance):
    checkpoint = Checkpoint.open(conformance / "checkpoint")
    pixels = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = load_model(checkpoint).image_encoder(pixels)
    assert torch.equal(image_embeddings(load_image_encoder(checkpoint, None), pixels), whole)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 2, "attention_bias": True},
        {"tie_word_embeddings": True, "head_dim": 16},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_hidden_states_and_logits_layer_by_layer(options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=5000, **options)
    torch.manual_seed(0)
    whole = LlamaForCausalLM(config).eval()
    token_ids = [5, 4999, 17, 300, 5]
    with torch.inference_mode():
        expected = whole(torch.tensor([token_ids]), output_hidden_states=True)
    streamed = StreamedDecoder(config, whole.state_dict())
    *hidden, last = streamed.hidden_states(streamed.embed(token_ids))
    for found, reference in zip(hidden, expected.hidden_states[1:], strict=False):
        torch.testing.assert_close(found, reference[0])
    torch.testing.assert_close(streamed.logits(last), expected.logits[0])


def test_stored_types_are_computed_in_float32():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    half = LlamaForCausalLM(config).half()
    with torch.inference_mode():
        expected = half.float()(torch.tensor([[1, 2, 3]])).logits[0]
    state = {name: tensor.half() for name, tensor in half.state_dict().items()}
    streamed = StreamedDecoder(config, state)
    *_, last = streamed.hidden_states(streamed.embed([1, 2, 3]))
    torch.testing.assert_close(streamed.logits(last), expected)
