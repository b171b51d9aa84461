"""A GPU that is not there: CUDA's calls on host memory, TensorRT's on ONNX Runtime.

It shows that the chain hands over the right addresses, shapes and order of work; it says nothing of a GPU. An "engine"
is the ONNX file that it stands for.
"""

import ctypes
import sys
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

from runtime.backends.ort_session import PROVIDERS

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class Cudart:
    """cuda.bindings.runtime, as far as the project calls it. Memory is the host's, and work is done at once."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaEventDisableTiming = 2
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )

    def __init__(self, capability: tuple[int, int] = (8, 9), devices: int = 1):
        self._capability, self._devices = capability, devices
        self.memory: dict[int, ctypes.Array] = {}
        self.streams = [77]  # the first is the common one
        self.recording: list | None = None
        self.recorded_stream: int | None = None
        self.capture_fails = False
        self.replays = self.destroyed = 0
        self.copied = {1: 0, 2: 0, 3: 0}  # bytes by kind
        self.arriving: list = []  # copies to the host, which nobody may read before waiting
        self.leaving: list = []  # copies from the host, whose source nobody may change before waiting
        self.events: set[int] = set()

    def cudaGetDeviceCount(self):
        return (Status.cudaSuccess if self._devices else Status.cudaErrorNoDevice), self._devices

    def cudaDeviceGetAttribute(self, attribute, device):
        return Status.cudaSuccess, self._capability[attribute == "minor"]

    def cudaStreamCreate(self):
        self.streams.append(self.streams[-1] + 1)
        return Status.cudaSuccess, self.streams[-2]

    def cudaStreamDestroy(self, stream):
        return (Status.cudaSuccess if stream not in (77, self.recorded_stream) else Status.cudaErrorInvalidValue,)

    def cudaStreamSynchronize(self, stream):
        self._arrive()
        recording = stream == self.recorded_stream
        return (Status.cudaErrorStreamCaptureUnsupported if recording else Status.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags):
        assert flags == self.cudaEventDisableTiming
        self.events.add(event := max(self.events, default=0) + 1)
        return Status.cudaSuccess, event

    def cudaEventRecord(self, event, stream):
        return (Status.cudaSuccess if event in self.events else Status.cudaErrorInvalidValue,)

    def cudaEventSynchronize(self, event):
        self._arrive()
        return (Status.cudaSuccess if event in self.events else Status.cudaErrorInvalidValue,)

    def cudaEventDestroy(self, event):
        self.events.remove(event)
        return (Status.cudaSuccess,)

    def _arrive(self) -> None:
        for target, content in self.arriving:
            ctypes.memmove(target, content, len(content))
        self.arriving.clear()
        for source, content in self.leaving:
            assert ctypes.string_at(source, len(content)) == content, "changed before it had been copied"
        self.leaving.clear()

    def cudaMallocAsync(self, size, stream):
        block = (ctypes.c_byte * size)()
        ctypes.memset(block, 0xAB, size)  # nobody may rely on fresh memory
        self.memory[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFreeAsync(self, pointer, stream):
        del self.memory[pointer]
        return (Status.cudaSuccess,)

    def cudaHostAlloc(self, size, flags):
        return self.cudaMallocAsync(size, None)

    def cudaFreeHost(self, pointer):
        return self.cudaFreeAsync(pointer, None)

    def cudaMemsetAsync(self, pointer, value, size, stream):
        ctypes.memset(pointer, value, size)
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            self.submit(lambda: self.arriving.append((target, ctypes.string_at(source, size))))
        else:
            self.submit(lambda: ctypes.memmove(target, source, size))
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice and self.recording is None:
            self.leaving.append((source, ctypes.string_at(source, size)))
        self.copied[kind] += size
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording, self.recorded_stream = [], stream
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        assert stream == self.recorded_stream != 77, "other threads put work into the common one"
        recorded, self.recording, self.recorded_stream = self.recording, None, None
        if self.capture_fails:
            return Status.cudaErrorStreamCaptureUnsupported, None
        return Status.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph, flags):
        return Status.cudaSuccess, graph

    def cudaGraphDestroy(self, graph):
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph):
        self.destroyed += 1
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graph, stream):
        self.replays += 1
        for work in graph:
            work()
        return (Status.cudaSuccess,)

    def submit(self, work) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)


class TensorRT:
    """tensorrt_rtx, as far as the runtime calls it."""

    __name__ = "tensorrt_rtx"
    __version__ = "1.0"

    def __init__(self, cudart: Cudart):
        self._cudart = cudart
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    class Logger:
        ERROR = 1

        def __init__(self, level):
            pass

    def _deserialize(self, content: bytes):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(content, options)
        except Exception:
            return None
        return SimpleNamespace(create_execution_context=lambda: Context(session, self._cudart))


class Context:
    def __init__(self, session: onnxruntime.InferenceSession, cudart: Cudart):
        self._session, self._cudart = session, cudart
        self._inputs = {value.name: DTYPES[value.type] for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._shapes, self._addresses = {}, {}
        self.ran = False

    def set_optimization_profile_async(self, profile, stream):
        return stream == 77

    def set_input_shape(self, name, shape):
        self._shapes[name] = tuple(shape)
        return name in self._inputs

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return name in self._inputs or name in self._outputs

    def execute_async_v3(self, stream):
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        if self._cudart.recording is not None and not self.ran:
            return False  # as TensorRT: the first execution of a shape cannot be recorded
        self.ran = True
        self._cudart.submit(lambda: self._run(shapes, addresses))
        return stream == (self._cudart.recorded_stream or 77)

    def _run(self, shapes, addresses):
        feeds = {name: array_at(addresses[name], shapes[name], dtype).copy() for name, dtype in self._inputs.items()}
        for name, value in zip(self._outputs, self._session.run(None, feeds), strict=True):
            value = np.ascontiguousarray(value)
            ctypes.memmove(addresses[name], value.ctypes.data, value.nbytes)


def array_at(address: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


def install(monkeypatch, **gpu) -> Cudart:
    """Let the runtime see the simulated GPU, and TensorRT for RTX 1.0 on it."""
    cudart = Cudart(**gpu)
    monkeypatch.setattr("runtime.device.cuda._cudart", lambda: cudart)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", TensorRT(cudart))
    monkeypatch.setattr("runtime.backends.select.installed_flavours", lambda: {"rtx": TensorRT.__version__})
    return cudart


def install_provider(monkeypatch) -> list[bool]:
    """Let ONNX Runtime's CPU provider pass for CUDA's, on host memory that passes for a GPU's.

    Returns a list, which tells of each session opened from now on whether it was asked to record.
    """
    asked = []

    def providers(provider: str, device, cuda_graph: bool, channels_last: bool) -> list[str]:
        asked.append(cuda_graph)
        return ["CPUExecutionProvider"]

    monkeypatch.setattr("runtime.backends.ort_session._require_provider", lambda provider: None)
    monkeypatch.setattr("runtime.backends.ort_session._providers", providers)
    monkeypatch.setitem(PROVIDERS, "cuda", ("CPUExecutionProvider", ""))
    monkeypatch.setattr("runtime.device.cuda.Cuda.name", "cpu")
    return asked


def as_engine(model: onnx.ModelProto) -> bytes:
    """What stands in for a serialised engine."""
    return model.SerializeToString()
