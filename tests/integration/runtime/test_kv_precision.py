"""A KV cache in float16 or int8: the same answers in less memory, over the same weights."""

import json
import shutil

import numpy as np
import pytest

from runtime import kernels
from runtime.backends import select
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.select import Backends, open_decoder, plan_batch
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from runtime.model import load
from runtime.serve.settings import Settings
from runtime.text.template import first_turn
from runtime.types import Options, Trace
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


@pytest.mark.parametrize("number", range(3))
def test_an_int8_cache_chooses_the_references_tokens(conformance, reference, conformance_bundle, built, number):
    """Each after the reference's own, since weights are random: of 512 tokens some are as likely as the next."""
    case = reference["cases"][number]
    expected = np.load(conformance / f"case{number}.npz")["generated_ids"].tolist()
    answers = {}
    for name in ("fp32", "int8"):
        model = load(conformance_bundle, backends=Backends(kv_precision=name))
        assert model.decoder_backend.kv_precision == name
        trace = Trace()
        list(model.generate([conformance / case["image"]], case["prompt"], Options(1), trace))
        text = first_turn(model.bundle.prompt, case["prompt"], 1)
        prompt = model.tokenizer.encode_prompt(text, [len(trace.image_embeds)])
        sequence = model.decoder.start(1024)
        token = sequence.forward_greedy(prompt, trace.image_embeds)
        answers[name] = [token, *(sequence.forward_greedy([given]) for given in expected[:-1])]
    assert answers["fp32"] == expected
    assert np.mean(np.equal(answers["int8"], expected)) >= 0.8


@pytest.mark.parametrize(("kv_precision", "error"), [("fp16", 5e-3), ("int8", 6e-2)])
def test_logits_are_near_and_in_float32(bundle, built, kv_precision, error):
    prompt = np.random.default_rng(1).integers(3, 512, 60).tolist()
    single, rounded = (decoder(bundle, name).start(64).forward(prompt).copy() for name in ("fp32", kv_precision))
    assert rounded.dtype == np.float32
    assert 0 < np.linalg.norm(rounded - single) <= error * np.linalg.norm(single)


@pytest.mark.parametrize(("kv_precision", "share"), [("fp16", 1 / 2), ("int8", (32 + 4) / (4 * 32))])
def test_the_cache_takes_less_memory(bundle, built, kv_precision, share):
    single, rounded = ({array.nbytes for pair in decoder(bundle, name).start(64).cache.layers for array in pair}
                       for name in ("fp32", kv_precision))  # fmt: skip
    assert rounded == {share * size for size in single}


def test_what_an_int8_cache_holds_is_the_same_however_it_came_there(built):
    """In one prompt, in pieces, after another end that was forgotten, or token by token: bit for bit."""
    quantized = decoder(open_bundle(exported("--res", 256, "--decoder-precision", "int8")), "int8")
    prompt = np.random.default_rng(1).integers(3, 512, 300).tolist()
    expected = quantized.start(310).forward(prompt).copy()
    sequence = quantized.start(310)
    sequence.forward([*prompt[:200], 7, 8, 9])
    sequence.rewind(200)
    sequence.forward(prompt[200:290])
    for token in prompt[290:]:
        found = sequence.forward([token])
    np.testing.assert_array_equal(found, expected)


def test_an_int8_cache_needs_the_kernels(bundle, monkeypatch):
    monkeypatch.setattr(kernels, "unavailable", lambda: "the processor has no avx2")
    with pytest.raises(UserError, match=r"^--kv-precision int8: .*the processor has no avx2"):
        open_decoder(bundle, Backends(kv_precision="int8"))


@pytest.mark.parametrize("kv_precision", ["fp16", "int8"])
def test_slots_are_what_a_lone_sequence_is(bundle, built, kv_precision):
    opened = decoder(bundle, kv_precision)
    prompts = [np.random.default_rng(seed).integers(3, 512, 20 + seed).tolist() for seed in range(3)]
    slots = opened.start_batch(3, batch_invariant=True)
    tokens = [slots[i].forward_greedy(prompt) for i, prompt in enumerate(prompts)]
    answers = [[token] for token in tokens]
    for _ in range(10):
        tokens = slots.step(tokens)
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
    for answer, prompt in zip(answers, prompts, strict=True):
        sequence = opened.start(64)
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
    for file in [file for file in manifest["files"] if "-kv" in file]:
        del manifest["files"][file]
        (old / file).unlink()
    (old / "manifest.json").write_text(json.dumps(manifest))
    opened = open_bundle(old)
    assert decoder(opened, "auto").part.kv_dtype == "float32"
    for name in ("fp16", "int8"):
        with pytest.raises(UserError, match="has graphs for fp32 alone"):
            decoder(opened, name)
        with pytest.raises(UserError, match=rf"^--kv-precision {name}: .*has graphs for fp32 alone"):
            plan_batch(opened, Backends(kv_precision=name))
        with pytest.raises(UserError, match=rf"^--kv-precision {name}: .*has graphs for fp32 alone"):
            Settings.of(bundle=str(old), kv_precision=name).fitted()


def test_a_shorter_context(bundle):
    assert open_decoder(bundle, Backends(context=100)).capacity == 100
    assert open_decoder(bundle, Backends(context=10**6)).capacity == bundle.decoder.context_length
    for wrong in ({"context": 0}, {"kv_precision": "int3"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Backends(**wrong)
