"""How long this process's computation waits in collectives: for the other processes, and for the transfer itself.

DeepSpeed (0.19.8) makes all its exchanges through one object, `deepspeed.comm.comm.cdb`. On CPUs the thread that
computes waits inside its methods, or inside `wait` of the handles that they return. On GPUs the collectives run on
streams of NCCL and of DeepSpeed, and the computing stream waits for these: in the methods and handles too, or where
ZeRO with `overlap_comm` calls `Stream.wait_stream`, `Stream.synchronize` and the accelerator's `synchronize`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Protocol

import torch

COLLECTIVES = (
    "all_gather",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "inference_all_reduce",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)
"""Methods of DeepSpeed's backend in which a process waits for others."""

MOST_OPEN_SPANS = 4096
"""Pairs of CUDA events that have not been read; while all of them lie ahead of the device, waits go uncounted."""


class _Timer(Protocol):
    """Adds up spans of waiting; `seconds` is their sum. `end` is given what `begin` has returned."""

    @property
    def seconds(self) -> float: ...

    def begin(self) -> Any: ...

    def end(self, began: Any) -> None: ...


class HostTimer:
    """Time that the calling thread spends in the spans."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def begin(self) -> float:
        return time.perf_counter()

    def end(self, began: float) -> None:
        self.seconds += time.perf_counter() - began


class StreamTimer:
    """Time that a CUDA stream, the one current at the start, spends between the two ends of the spans.

    Spans that begin while another stream is current count nothing. Only `seconds` waits for the device.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.current_stream()
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []

    def begin(self) -> torch.cuda.Event | None:
        if torch.cuda.current_stream() != self.stream or not self._has_room():
            return None
        began = self._event()
        began.record(self.stream)
        return began

    def end(self, began: torch.cuda.Event | None) -> None:
        if began is not None:
            ended = self._event()
            ended.record(self.stream)
            self._open.append((began, ended))

    @property
    def seconds(self) -> float:
        while self._open:
            self._open[0][1].synchronize()
            self._close_first()
        return self._seconds

    def _event(self) -> torch.cuda.Event:
        return self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)

    def _has_room(self) -> bool:
        if len(self._open) == MOST_OPEN_SPANS:
            while self._open and self._open[0][1].query():
                self._close_first()
        return len(self._open) < MOST_OPEN_SPANS

    def _close_first(self) -> None:
        began, ended = self._open.popleft()
        self._seconds += began.elapsed_time(ended) / 1000
        self._free += [began, ended]


class CommunicationWatch:
    """The seconds for which this process's computation has waited in collectives.

    `call` makes one exchange that counts, `installed` lets all of DeepSpeed's count. On GPUs asking for `seconds`
    waits for the device, and nothing else here does.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._timer: _Timer = StreamTimer() if self._on_gpu else HostTimer()
        self._is_paused = self._is_waiting = False

    @property
    def seconds(self) -> float:
        return self._timer.seconds

    def call(self, exchange: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Result of an exchange with the other processes; the time counts, once where exchanges are nested."""
        if self._is_paused or self._is_waiting:
            return exchange(*arguments, **keywords)
        self._is_waiting, began = True, self._timer.begin()
        try:
            return exchange(*arguments, **keywords)
        finally:
            self._timer.end(began)
            self._is_waiting = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exchanges inside do not count."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, DeepSpeed's exchanges count; it must have been initialised."""
        from deepspeed.accelerator import get_accelerator
        from deepspeed.comm import comm

        with ExitStack() as replaced:
            for name in COLLECTIVES:
                replaced.enter_context(_replaced(comm.cdb, name, self._watched(getattr(comm.cdb, name))))
            if self._on_gpu:
                stream, accelerator = torch.cuda.Stream, get_accelerator()
                replaced.enter_context(_replaced(stream, "wait_stream", self._watched_if_current(stream.wait_stream)))
                replaced.enter_context(_replaced(stream, "synchronize", self._watched(stream.synchronize)))
                replaced.enter_context(_replaced(accelerator, "synchronize", self._watched(accelerator.synchronize)))
            yield

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = self.call(function, *arguments, **keywords)
            return _WatchedWork(result, self) if hasattr(result, "wait") else result

        return call

    def _watched_if_current(self, wait_stream: Callable[..., None]) -> Callable[..., None]:
        """Another stream that is told to wait holds up no computation."""

        @wraps(wait_stream)
        def call(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
            if stream == torch.cuda.current_stream():
                self.call(wait_stream, stream, other)
            else:
                wait_stream(stream, other)

        return call


class _WatchedWork:
    """The handle of an exchange under way, whose `wait` counts."""

    def __init__(self, work: Any, watch: CommunicationWatch):
        self._work, self._watch = work, watch

    def wait(self, *arguments: Any, **keywords: Any) -> Any:
        return self._watch.call(self._work.wait, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of an object or a class is another one."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
