"""Decoding that stays on the GPU, by ONNX Runtime's CPU provider on simulated GPU memory.

The same tokens as on the CPU, whatever comes between the steps, and nothing but a token's id leaves the GPU.
"""

import gc
import shutil

import numpy as np
import onnx
import pytest

import runtime
from runtime.backends.ort_cuda_graph import MIN_CAPACITY, CudaGraphDecoder
from runtime.backends.ort_session import open_device
from runtime.backends.select import Backends
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from runtime.types import Sampling
from tests.support import simulated_gpu

PROMPT = [1, 20, 30, 40, 50, 60]


@pytest.fixture(scope="module")
def reference(conformance_bundle):
    return runtime.load(conformance_bundle, backends=Backends(encoder="onnx", decoder="onnx")).decoder


@pytest.fixture
def cudart(monkeypatch):
    return simulated_gpu.install(monkeypatch)


@pytest.fixture
def numbers(monkeypatch):
    """Under which each binding is recorded."""
    found = []
    import runtime.backends.ort_cuda_graph as module

    original = module.run_options
    monkeypatch.setattr(module, "run_options", lambda device, graph: found.append(graph) or original(device, graph))
    return found


@pytest.fixture
def decoder(conformance_bundle, cudart, numbers, monkeypatch):
    simulated_gpu.install_provider(monkeypatch)
    model = runtime.load(conformance_bundle, backends=Backends(encoder="onnx", provider="cuda"))
    assert isinstance(model.decoder, CudaGraphDecoder)
    return model.decoder


def greedy(sequence, token: int, steps: int) -> list[int]:
    found = []
    for _ in range(steps):
        token = sequence.forward_greedy([token])
        found.append(token)
    return found


def test_the_tokens_are_those_of_the_cpu_and_stay_on_the_gpu(decoder, reference, cudart):
    sequence, expected = decoder.start(64), reference.start(64)
    first = sequence.forward_greedy(PROMPT)
    assert first == expected.forward_greedy(PROMPT)
    up, down = cudart.copied[1], cudart.copied[2]
    steps = 40
    assert greedy(sequence, first, steps) == greedy(expected, first, steps)
    assert cudart.copied[1] == up, "nothing goes up"
    assert cudart.copied[2] - down == 8 * steps, "an id a step comes down, of the step ahead too"
    assert sequence.cache.length == expected.cache.length


SAMPLINGS = (
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=2.0, top_k=20, top_p=0.9, seed=4),
    Sampling(temperature=0.7, top_k=10**6, seed=5),
)


def drawn(sequence, token: int, steps: int, sampling: Sampling, random: np.random.Generator) -> list[int]:
    found = []
    for _ in range(steps):
        token = sequence.forward_sampled([token], None, sampling, random)
        found.append(token)
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_drawn_tokens_are_those_of_the_cpu_and_stay_on_the_gpu(decoder, reference, cudart, sampling):
    sequence, expected = decoder.start(64), reference.start(64)
    random, same = (np.random.default_rng(sampling.seed) for _ in range(2))
    first = sequence.forward_sampled(PROMPT, None, sampling, random)
    assert first == expected.forward_sampled(PROMPT, None, sampling, same)
    up, down = cudart.copied[1], cudart.copied[2]
    steps = 40
    found = drawn(sequence, first, steps, sampling, random)
    assert found == drawn(expected, first, steps, sampling, same)
    assert len(set(found)) > 10
    assert cudart.copied[1] - up == 8 * steps, "a random number a step goes up"
    assert cudart.copied[2] - down == 8 * steps, "an id a step comes down"


def test_drawn_and_likeliest_tokens_in_turn(decoder, reference):
    """With a generator for each answer, as the chain has them."""
    sequence, expected = decoder.start(256), reference.start(256)
    token = sequence.forward_greedy(PROMPT)
    assert token == expected.forward_greedy(PROMPT)
    for turn in range(6):
        sampling = SAMPLINGS[turn % len(SAMPLINGS)]
        random, same = (np.random.default_rng(turn) for _ in range(2))
        found = drawn(sequence, token, 7, sampling, random)
        assert found == drawn(expected, token, 7, sampling, same)
        known = greedy(sequence, found[-1], 3)
        assert known == greedy(expected, found[-1], 3)
        token = known[-1]
        if turn % 2:
            sequence.rewind(20)
            expected.rewind(20)
    assert sequence.cache.length == expected.cache.length


def test_without_a_sampling_graph_the_host_draws(conformance_bundle, reference, cudart, monkeypatch):
    """As with bundles from before there was one."""
    simulated_gpu.install_provider(monkeypatch)
    bundle = open_bundle(conformance_bundle)
    decoder = CudaGraphDecoder(bundle.path(bundle.decoder.file), bundle.decoder, open_device("cuda"))
    sequence, expected = decoder.start(64), reference.start(64)
    random, same = (np.random.default_rng(0) for _ in range(2))
    assert drawn(sequence, 20, 10, SAMPLINGS[0], random) == drawn(expected, 20, 10, SAMPLINGS[0], same)


def test_a_sampling_graph_that_cannot_be_recorded(conformance_bundle, reference, tmp_path, cudart, monkeypatch, caplog):
    """Greedy steps stay recorded."""
    simulated_gpu.install_provider(monkeypatch)
    bundle, broken = open_bundle(conformance_bundle), tmp_path / "sampler.onnx"
    broken.write_bytes(b"no graph")
    decoder = CudaGraphDecoder(bundle.path(bundle.decoder.file), bundle.decoder, open_device("cuda"), broken)
    assert "tokens are sampled on the host" in caplog.text and "sampler.onnx" in caplog.text
    sequence, expected = decoder.start(64), reference.start(64)
    random, same = (np.random.default_rng(0) for _ in range(2))
    assert drawn(sequence, 20, 10, SAMPLINGS[0], random) == drawn(expected, 20, 10, SAMPLINGS[0], same)
    assert greedy(sequence, 20, 4) == greedy(expected, 20, 4)


def test_a_step_that_cannot_be_recorded(conformance_bundle, cudart, monkeypatch):
    """ONNX Runtime says so in the first run."""
    simulated_gpu.install_provider(monkeypatch)

    def step(self):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("runtime.backends.ort_cuda_graph.CudaGraphSequence._step", step)
    model = runtime.load(conformance_bundle, backends=Backends(encoder="onnx", provider="cuda"))
    assert "without a CUDA graph" in (reason := model.decoder_backend.reason) and "operation not permitted" in reason
    assert not isinstance(model.decoder, CudaGraphDecoder)


def test_steps_run_one_ahead_of_the_host(decoder, monkeypatch):
    sequence = decoder.start(64)
    happened = []
    step, wait = sequence._step, sequence._device.wait
    monkeypatch.setattr(sequence, "_step", lambda: happened.append("step") or step())
    monkeypatch.setattr(sequence._device, "wait", lambda event: happened.append("wait") or wait(event))
    greedy(sequence, sequence.forward_greedy(PROMPT), 3)
    assert happened == ["step", "wait"] * 4, "a step is in the stream before the host waits for the one before"


def test_whatever_comes_between_the_steps(decoder, reference):
    """Tokens chosen elsewhere, prompts, logits, going back, with and without a step ahead."""
    sequence, expected = decoder.start(128), reference.start(128)
    random = np.random.default_rng(0)
    likeliest = sequence.forward_greedy(PROMPT)
    assert likeliest == expected.forward_greedy(PROMPT)
    for turn in range(60):
        what = random.integers(6)
        if what < 2:
            ids = [likeliest]
        elif what == 2:
            ids = [int(random.integers(3, 200))]
        else:
            ids = [int(token) for token in random.integers(3, 200, random.integers(1, 5))]
        if what == 4:
            length = int(random.integers(1, expected.cache.length + 1))
            sequence.rewind(length)
            expected.rewind(length)
        if expected.cache.length + len(ids) > 120:
            sequence.rewind(6)
            expected.rewind(6)
        if what == 5:
            logits, wanted = sequence.forward(ids), expected.forward(ids)
            assert np.array_equal(logits, wanted), turn
            likeliest = int(wanted.argmax())
        else:
            likeliest = sequence.forward_greedy(ids)
            assert likeliest == expected.forward_greedy(ids), turn
        assert sequence.cache.length == expected.cache.length


def test_a_full_cache_ends_it_where_it_does_on_the_cpu(decoder):
    sequence = decoder.start(MIN_CAPACITY)
    token = sequence.forward_greedy(list(range(3, MIN_CAPACITY + 1)))
    token = sequence.forward_greedy([token])
    token = sequence.forward_greedy([token])
    assert sequence.cache.length == sequence.cache.capacity == MIN_CAPACITY
    with pytest.raises(ValueError, match=f"{MIN_CAPACITY + 1} positions do not fit"):
        sequence.forward_greedy([token])


def test_what_was_recorded_is_used_again(decoder, reference, numbers):
    expected = reference.start(64)
    wanted = greedy(expected, expected.forward_greedy(PROMPT), 8)
    first, second = decoder.start(60), decoder.start(64)
    assert numbers == [1, 2], "two at once are recorded apart"
    assert first.cache.layers[0][0].pointer != second.cache.layers[0][0].pointer
    greedy(first, first.forward_greedy([9, 8, 7, 6, 5, 4, 3]), 20)
    del first
    gc.collect()
    third = decoder.start(200)  # rounded up to as many positions
    assert greedy(third, third.forward_greedy(PROMPT), 8) == wanted
    assert numbers == [1, 2]


def test_without_a_graph_where_onnx_runtime_cannot_record(conformance_bundle, reference, cudart, monkeypatch):
    simulated_gpu.install_provider(monkeypatch)
    original = runtime.backends.ort_session._providers

    def providers(provider, device, cuda_graph, channels_last):
        if cuda_graph:
            raise UserError("not all nodes are on the CUDA provider")
        return original(provider, device, cuda_graph, channels_last)

    monkeypatch.setattr("runtime.backends.ort_session._providers", providers)
    model = runtime.load(conformance_bundle, backends=Backends(encoder="onnx", provider="cuda"))
    assert "not all nodes" in (reason := model.decoder_backend.reason) and "fp16 and w4a16" in reason
    sequence, expected = model.decoder.start(64), reference.start(64)
    first = sequence.forward_greedy(PROMPT)
    assert first == expected.forward_greedy(PROMPT)
    assert greedy(sequence, first, 8) == greedy(expected, first, 8)


def test_a_graph_that_does_not_say_the_likeliest_token(conformance_bundle, tmp_path, cudart, monkeypatch):
    """As bundles from before there was that output."""
    simulated_gpu.install_provider(monkeypatch)
    folder = shutil.copytree(conformance_bundle / "decoder", tmp_path / "decoder")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (output,) = [value for value in model.graph.output if value.name == "next_token"]
    model.graph.output.remove(output)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(UserError, match="no output next_token"):
        CudaGraphDecoder(folder / "model.onnx", open_bundle(conformance_bundle).decoder, open_device("cuda"))


@pytest.mark.parametrize(
    "sampling", [Sampling(), *SAMPLINGS, Sampling(temperature=1.0, repetition_penalty=1.3, seed=1)], ids=str
)
def test_an_answer_on_the_gpu_is_that_of_the_cpu(conformance_bundle, cudart, monkeypatch, sampling):
    """Through the whole chain, several turns and questions."""
    on_cpu = runtime.load(conformance_bundle, backends=Backends(encoder="onnx", decoder="onnx"))
    simulated_gpu.install_provider(monkeypatch)
    on_gpu = runtime.load(conformance_bundle, backends=Backends(encoder="onnx", provider="cuda"))
    options = runtime.Options(max_new_tokens=12, sampling=sampling)
    for prompts in (["What?", "And then?"], ["Why is it so?"]):
        answers = []
        for model in (on_cpu, on_gpu):
            chat = model.chat(options)
            answers.append([list(chat.ask(prompt))[-1].result.token_ids for prompt in prompts])
        assert answers[0] == answers[1]


def test_capacities_are_powers_of_two_up_to_the_context(decoder):
    assert [decoder.start(positions).cache.capacity for positions in (1, 256, 257, 700)] == [256, 256, 512, 1024]
    assert decoder.start(decoder.capacity).cache.capacity == decoder.capacity
