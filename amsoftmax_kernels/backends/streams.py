"""Work on a CPU in streams, each of which one thread runs from end to end.

An operation that is split over all cores ends with a barrier, thousands a step where there are many chunks of classes; a
core that has a neighbour then stops the others. Here whole chunks are given to threads, each of which multiplies alone. How
many streams there are depends on the shapes, not on the threads, so that sums are the same bits for any number of threads.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

WORKSPACE_BYTES = 8 << 20  # that a thread keeps between steps

_lock = threading.Lock()
_pools: dict[int, _Pool] = {}  # by their number of threads
_kept = threading.local()


class _Stopped(Exception):
    """Another stream has failed, or the caller was interrupted."""


def run(count: int, items: int, work: Callable[[Iterable[int]], _T]) -> list[_T]:
    """``work(stream's items)`` of each of ``count`` streams, in their order; stream i has items i, i + count, …

    As many run at once as PyTorch has threads here, each with operations of one thread, in the caller's grad and inference
    mode. The first error comes out as it is, once all have stopped. A single stream is the caller's, with all its threads.
    """
    if count == 1 or torch.get_num_threads() == 1:
        return [work(range(stream, items, count)) for stream in range(count)]
    stop = threading.Event()

    def stream(first: int) -> Callable[[], _T]:
        return lambda: work(_until(stop, range(first, items, count)))

    return _on_threads([stream(first) for first in range(count)], stop)


def alone(work: Callable[[], _T]) -> _T:
    """``work()`` with operations of one thread: after one that they share, PyTorch's other threads spin for milliseconds."""
    return work() if torch.get_num_threads() == 1 else _on_threads([work], threading.Event())[0]


def _on_threads(works: Sequence[Callable[[], _T]], stop: threading.Event) -> list[_T]:
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def moded(work: Callable[[], _T]) -> _T:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work()

    pool = _pool(torch.get_num_threads())
    futures = [pool.submit(functools.partial(moded, work)) for work in works]
    try:
        return [future.result() for future in futures]
    except BaseException as error:
        stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
        if isinstance(error, _Stopped):  # a stream that waited for nothing was asked first
            error = next(each for each in map(_error, futures) if each is not None and not isinstance(each, _Stopped))
        raise error


def _error(future: Future[_T]) -> BaseException | None:
    return None if future.cancelled() else future.exception()


def _until(stop: threading.Event, items: Iterable[int]) -> Iterator[int]:
    for item in items:
        if stop.is_set():
            raise _Stopped
        yield item


class _Pool:
    """Threads of one core each. Of our own, as the library's stop serving where the main thread ends."""

    def __init__(self, threads: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        ready: SimpleQueue[None] = SimpleQueue()
        started = 0
        try:
            for number in range(threads):
                name = f"amsoftmax_kernels-{number}"
                threading.Thread(target=self._serve, args=(ready,), name=name, daemon=True).start()
                started += 1
        except BaseException:
            for _ in range(started):
                self._tasks.put(None)
            raise
        finally:
            for _ in range(started):
                ready.get()
            torch.set_num_threads(threads)  # what threads that are made later start from

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        self._tasks.put((future, work))
        return future

    def _serve(self, ready: SimpleQueue[None]) -> None:
        torch.get_num_threads()  # PyTorch sets up a thread at its first call, to the process's number
        torch.set_num_threads(1)
        ready.put(None)
        while (task := self._tasks.get()) is not None:
            future, work = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del task, future, work  # what they hold is the caller's


def _pool(threads: int) -> _Pool:
    """The threads, made when they are first needed."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = _Pool(threads)
        return _pools[threads]


def _forget() -> None:
    """In a process that was forked: its threads are not there."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()
    _kept.__dict__.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def workspace(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A temporary of this thread, of undefined values; one of the same name is overwritten. Large ones are not kept."""
    size = 1
    for each in shape:
        size *= each
    key = (name, like.dtype)
    buffers: dict[object, Tensor] = _kept.__dict__.setdefault("buffers", {})
    found = buffers.get(key)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = torch.empty(size, dtype=like.dtype, device=like.device)
        buffers.pop(key, None)
        if found.nbytes <= WORKSPACE_BYTES:
            if sum(each.nbytes for each in buffers.values()) + found.nbytes > WORKSPACE_BYTES:
                buffers.clear()
            buffers[key] = found
    return found[:size].view(shape)
