"""A KV cache in float16: the same answers in half the memory, over the same weights."""

import json
import shutil

import numpy as np
import pytest

from runtime.backends import select
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.select import Backends, open_decoder
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from runtime.model import load
from runtime.types import Options
from tests.support.bundles import exported


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundle(request):
    """One with ONNX Runtime's matmuls and one with this project's."""
    options = () if request.param == "fp32" else ("--decoder-precision", request.param)
    return open_bundle(exported("--res", 256, *options))


def decoder(bundle, kv_precision: str) -> OnnxDecoder:
    """With float32 matmuls or as near to them, so that nothing but the KV cache is rounded."""
    choice = "onnx" if bundle.decoder.precision == "fp32" else "kernels24"
    found = open_decoder(bundle, Backends(decoder=choice, kv_precision=kv_precision))
    assert isinstance(found, OnnxDecoder)
    return found


@pytest.mark.parametrize("number", range(3))
def test_greedy_tokens_are_the_references(conformance, reference, conformance_bundle, number):
    case = reference["cases"][number]
    expected = np.load(conformance / f"case{number}.npz")["generated_ids"].tolist()
    model = load(conformance_bundle, backends=Backends(kv_precision="fp16"))
    assert model.decoder_backend.to_dict()["kv_precision"] == "fp16"
    options = Options(reference["max_new_tokens"])
    *_, last = model.generate([conformance / case["image"]], case["prompt"], options)
    assert last.result.token_ids == expected


def test_logits_are_near_and_in_float32(bundle, built):
    prompt = np.random.default_rng(1).integers(3, 512, 60).tolist()
    single, half = (decoder(bundle, name).start(64).forward(prompt).copy() for name in ("fp32", "fp16"))
    assert half.dtype == np.float32
    assert 0 < np.linalg.norm(half - single) <= 5e-3 * np.linalg.norm(single)


def test_the_cache_takes_half_the_memory(bundle, built):
    single, half = ({array.nbytes for pair in decoder(bundle, name).start(64).cache.layers for array in pair}
                    for name in ("fp32", "fp16"))  # fmt: skip
    assert {2 * size for size in half} == single


def test_slots_are_what_a_lone_sequence_is(bundle, built):
    half = decoder(bundle, "fp16")
    prompts = [np.random.default_rng(seed).integers(3, 512, 20 + seed).tolist() for seed in range(3)]
    slots = half.start_batch(3, batch_invariant=True)
    tokens = [slots[i].forward_greedy(prompt) for i, prompt in enumerate(prompts)]
    answers = [[token] for token in tokens]
    for _ in range(10):
        tokens = slots.step(tokens)
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
    for answer, prompt in zip(answers, prompts, strict=True):
        sequence = half.start(64)
        alone = [sequence.forward_greedy(prompt)]
        for _ in range(10):
            alone.append(sequence.forward_greedy([alone[-1]]))
        assert answer == alone


def test_auto_takes_it_where_float32_does_not_fit(bundle, monkeypatch):
    def found(available: int):
        monkeypatch.setattr(select, "available_bytes", lambda: available)
        backend = select.open_components(bundle, Backends()).decoder_backend
        return backend.kv_precision, backend.reason

    assert found(64 << 30)[0] == "fp32"
    precision, reason = found(1 << 20)
    assert precision == "fp16" and "KV cache in fp16" in reason and "MiB in fp32" in reason


def test_a_bundle_without_the_graph(bundle, built, tmp_path):
    old = tmp_path / "bundle"
    shutil.copytree(bundle.folder, old)
    manifest = json.loads((old / "manifest.json").read_text())
    for file in [file for file in manifest["files"] if "kv16" in file]:
        del manifest["files"][file]
        (old / file).unlink()
    (old / "manifest.json").write_text(json.dumps(manifest))
    opened = open_bundle(old)
    assert decoder(opened, "auto").part.kv_dtype == "float32"
    with pytest.raises(UserError, match="has graphs for fp32 alone"):
        decoder(opened, "fp16")


def test_a_shorter_context(bundle):
    assert open_decoder(bundle, Backends(context=100)).capacity == 100
    assert open_decoder(bundle, Backends(context=10**6)).capacity == bundle.decoder.context_length
    for wrong in ({"context": 0}, {"kv_precision": "int3"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Backends(**wrong)
