"""The accelerator as a hybrid step sees it: work started on it goes on by itself, while this thread
computes the cold neurons.

CudaAccelerator   a GPU: kernels are queued on a stream; copies have streams of their own.
HostAccelerator   the CPU in a GPU's place, with one thread as the stream: the same steps anywhere.

A step can be recorded once and run again (`record`): what is queued becomes CUDA graphs, with the
host's part of the step (`on_host`) between them. Owns streams and graphs, and no weights.
"""

import gc
import logging
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .errors import AcceleratorLost

log = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Step = Callable[[], object]


class Pending(Protocol[T_co]):
    """Something started; `result()` may be used by whatever is started later."""

    def result(self) -> T_co: ...


class _Started(Pending[T]):
    """Queued on a stream: whatever is queued later finds it done."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self) -> T:
        return self._value


class Program:
    """A recorded step: what is to run, in order, and the tensor that holds its result then."""

    def __init__(self, steps: list[Step], result: Tensor) -> None:
        self._steps, self._result = steps, result

    def run(self) -> Tensor:
        for step in self._steps:
            step()
        return self._result


class Stamp(Protocol):
    """A moment on the accelerator's clock."""

    def seconds_since(self, earlier: Any) -> float:
        """Once both have passed."""


class Accelerator(ABC):
    """Device and streams of one model. One thread drives it."""

    device: torch.device
    can_record = False
    runs_cpp = False  # the C++ kernels reach its memory
    runs_triton = False  # the Triton kernels run on it

    @abstractmethod
    def start(self, work: Callable[[], T]) -> Pending[T]:
        """Start work behind all that was started before."""

    def on_host(self, step: Step) -> None:
        """The host's part of a step, at this place in it: now, and in each run of a recording."""
        step()

    @abstractmethod
    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that copies need not wait for."""

    @abstractmethod
    def copy_stream(self) -> "CopyStream":
        """A stream of its own for copies."""

    @abstractmethod
    def stamp(self) -> Pending["Stamp"]:
        """The time at which all that was started before is done."""

    @abstractmethod
    def record(self, work: Callable[[], Tensor]) -> Program:
        """Record a step without running it. It must have run before, at the same shapes."""


class CopyStream(ABC):
    """Copies that go on beside the accelerator's work."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> None:
        """Start, as soon as all that was started on the accelerator before is done."""

    @abstractmethod
    def stamp(self) -> Stamp:
        """The time at which the copies have arrived."""

    @abstractmethod
    def wait(self) -> None:
        """Until the copies have arrived: the host waits."""

    @abstractmethod
    def join(self) -> None:
        """Until the copies have arrived: what is started on the accelerator later waits."""


class HostAccelerator(Accelerator):
    """The CPU as accelerator."""

    device = torch.device("cpu")
    runs_cpp = True

    def __init__(self) -> None:
        self._stream = ThreadPoolExecutor(1, thread_name_prefix="accelerator")

    def start(self, work: Callable[[], T]) -> Pending[T]:
        inference = torch.is_inference_mode_enabled()  # of each thread its own

        def run() -> T:
            with torch.inference_mode(inference):
                return work()

        return self._stream.submit(run)

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy_stream(self) -> CopyStream:
        return _DirectCopies()

    def stamp(self) -> Pending[Stamp]:
        return self._stream.submit(_HostStamp)

    def record(self, work: Callable[[], Tensor]) -> Program:
        raise NotImplementedError("steps on the host are not recorded: nothing is queued there")


class _HostStamp:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def seconds_since(self, earlier: "_HostStamp") -> float:
        return self._at - earlier._at


class _DirectCopies(CopyStream):
    """Copies within one memory are done when they return."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def stamp(self) -> Stamp:
        return _HostStamp()

    def wait(self) -> None:
        pass

    def join(self) -> None:
        pass


class CudaAccelerator(Accelerator):
    """One CUDA device, on the current stream."""

    can_record = True

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index or 0)
        self.runs_triton = find_spec("triton") is not None
        self._recording: _Recording | None = None

    def start(self, work: Callable[[], T]) -> Pending[T]:
        return _Started(work())

    def on_host(self, step: Step) -> None:
        if self._recording is None:
            step()
        else:
            self._recording.cut(step)

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy_stream(self) -> CopyStream:
        return _CudaCopies(self.device)

    def stamp(self) -> Pending[Stamp]:
        return _Started(_CudaStamp(torch.cuda.current_stream(self.device)))

    def record(self, work: Callable[[], Tensor]) -> Program:
        torch.cuda.synchronize(self.device)
        gc.collect()  # a graph or event that is freed while kernels are captured spoils the capture
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._recording = recording = _Recording()
        try:
            context: AbstractContextManager[object] = torch.cuda.stream(stream)
            with context:
                recording.begin()
                result = work()
                recording.end()
        finally:
            self._recording = None
        return Program(recording.steps, result)


class _CudaStamp:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def seconds_since(self, earlier: "_CudaStamp") -> float:
        self._event.synchronize()
        return 1e-3 * float(earlier._event.elapsed_time(self._event))


class _Recording:
    """CUDA graphs of one memory pool, cut where the host has something to do."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        """The graph is a step, if anything was queued: where there was not, torch warns of it."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._graph.capture_end()
        if not any("CUDA Graph is empty" in str(warning.message) for warning in caught):
            self.steps.append(self._graph.replay)

    def cut(self, step: Step) -> None:
        self.end()
        self.steps.append(step)
        self.begin()


class _CudaCopies(CopyStream):
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready, self._arrived = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._ready.record()
        self._stream.wait_event(self._ready)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._arrived.record()

    def stamp(self) -> Stamp:
        return _CudaStamp(self._stream)

    def wait(self) -> None:
        self._arrived.synchronize()

    def join(self) -> None:
        torch.cuda.current_stream().wait_event(self._arrived)


def is_loss(error: Exception) -> bool:
    """Whether an error says that the accelerator is lost, or that its memory ran out."""
    return isinstance(error, (AcceleratorLost, torch.AcceleratorError, torch.OutOfMemoryError))


def new_accelerator(device: torch.device) -> Accelerator:
    if device.type != "cuda":
        return HostAccelerator()
    accelerator = CudaAccelerator(device)
    if not accelerator.runs_triton:
        log.warning(
            "Triton is not installed: on %s all neurons are computed, by PyTorch, and steps are "
            "not recorded; `pip install hotneuron[gpu]` brings the sparse kernels",
            accelerator.device,
        )
    return accelerator
