"""Target `cuda`: flat tokens in PyTorch on any NVIDIA GPU, with one CUDA graph for each batch size."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aisle.build.cuda_device import too_little_memory
from aisle.build.cuda_layout import Bucket, Ints, Layout
from aisle.build.varlen import VarlenEncoder
from aisle.console import say
from aisle.errors import InputError

MAX_TEXTS = 1024  # in a batch
MAX_BATCH_TOKENS = 16384  # about 300 texts of usual length: larger batches gain almost nothing on an H100
SLOTS = 2  # batches in flight: the host lays out one while the GPU computes the other


@dataclass
class _Slot:
    """Host memory for one batch in flight, page-locked on a GPU."""

    inputs: Tensor
    logits: Tensor
    done: Any  # a CUDA event; None on a CPU


class CudaRunner:
    """Runs a module on a GPU. Callable from several threads: `SLOTS` batches are in flight at once."""

    max_texts = MAX_TEXTS
    concurrency = SLOTS

    def __init__(
        self,
        module: VarlenEncoder,
        max_tokens: int,
        device: torch.device,
        *,
        compiled: bool = True,
        graphs: bool = True,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        sizes: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Move a module to the device, compile it and capture a CUDA graph for every bucket.

        Args:
            compiled: use torch.compile, which fuses the operations between the matrix products.
            graphs: use CUDA graphs.
            sizes: (tokens, texts) of the batches to prepare for; all buckets by default.

        Raises:
            InputError: the GPU has too little memory.
        """
        self.layout = Layout(max_batch_tokens, MAX_TEXTS, max_tokens)
        self.max_batch_tokens = max_batch_tokens
        self.device, self.on_gpu = device, device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stream: Any = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self._compiled, self._graphs = compiled and self.on_gpu, graphs and self.on_gpu
        wanted = [self.layout.bucket(*size) for size in sizes] or self.layout.buckets
        try:
            self._prepare(module, [each for each in wanted if each])
        except torch.OutOfMemoryError:
            raise InputError(too_little_memory(device)) from None

    def __call__(self, tokens: Ints, lengths: Ints) -> tuple[npt.NDArray[np.float32], int]:
        """Return what the module returns for the texts, and the number of tokens computed, padding included."""
        results = [self._run(*piece) for piece in self.layout.pieces(tokens, lengths)]
        return np.concatenate([logits for logits, _ in results]), sum(computed for _, computed in results)

    def replayer(self, tokens: Ints, lengths: Ints) -> Callable[[], None]:
        """Lay out a batch once and return a function that runs it on the GPU, to time the GPU alone."""
        bucket = self.layout.bucket(len(tokens), len(lengths))
        if bucket is None:
            raise ValueError(f"no bucket holds {len(lengths)} texts of {len(tokens)} tokens")
        host = np.zeros(self.layout.size, np.int32)
        self.layout.fill(host, tokens, lengths, bucket)
        self._inputs.copy_(torch.from_numpy(host))
        graph = self._captured.get(bucket)

        def run() -> None:
            if not self.on_gpu:
                self._forward(bucket)
                return
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                if graph:
                    graph.replay()
                else:
                    self._forward(bucket)

        return run

    def _run(self, tokens: Ints, lengths: Ints) -> tuple[npt.NDArray[np.float32], int]:
        bucket = self.layout.bucket(len(tokens), len(lengths))
        assert bucket is not None
        slot = self._slots.get()
        try:
            self.layout.fill(slot.inputs.numpy(), tokens, lengths, bucket)
            with self._lock:
                self._enqueue(slot, bucket, len(lengths))
            if slot.done is not None:
                slot.done.synchronize()
            return slot.logits[: len(lengths)].numpy().copy(), bucket.tokens
        finally:
            self._slots.put(slot)

    def _enqueue(self, slot: _Slot, bucket: Bucket, texts: int) -> None:
        """Queue the copy to the GPU, the graph and the copy back. One stream keeps batches in order."""
        size = 2 * bucket.tokens + bucket.texts + 1
        if not self.on_gpu:
            self._inputs[:size].copy_(slot.inputs[:size])
            self._forward(bucket)
            slot.logits[:texts].copy_(self._logits[:texts])
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._inputs[:size].copy_(slot.inputs[:size], non_blocking=True)
            if graph := self._captured.get(bucket):
                graph.replay()
            else:
                self._forward(bucket)
            slot.logits[:texts].copy_(self._logits[:texts], non_blocking=True)
            slot.done.record(self._stream)

    def _forward(self, bucket: Bucket) -> None:
        with torch.no_grad():
            logits = self._module(*self.layout.views(self._inputs, bucket))
            self._logits[: bucket.texts].copy_(logits)

    def _prepare(self, module: VarlenEncoder, wanted: list[Bucket]) -> None:
        """Allocate, compile, warm up and capture: the largest bucket first, so that the others reuse its memory."""
        start = time.perf_counter()
        largest, outputs = self.layout.largest, module.shape.outputs
        self._module: Callable[..., Tensor] = module.to(self.device)
        self._inputs = torch.zeros(self.layout.size, dtype=torch.int32, device=self.device)
        self._logits = torch.zeros(largest.texts, outputs, device=self.device)
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(SLOTS):
            inputs = torch.zeros(self.layout.size, dtype=torch.int32, pin_memory=self.on_gpu)
            logits = torch.zeros(largest.texts, outputs, pin_memory=self.on_gpu)
            done = torch.cuda.Event() if self.on_gpu else None  # type: ignore[no-untyped-call]
            self._slots.put(_Slot(inputs, logits, done))
        self._captured: dict[Bucket, Any] = {}
        self.seconds["load"] = time.perf_counter() - start
        if not self.on_gpu:
            return
        start = time.perf_counter()
        if self._compiled:
            self._compile(module, wanted[-1])
        self.seconds["compile"] = time.perf_counter() - start
        start = time.perf_counter()
        if self._graphs:
            pool = torch.cuda.graph_pool_handle()
            for bucket in sorted(wanted, reverse=True):
                self._captured[bucket] = self._capture(bucket, pool)
        self._synchronize()
        self.seconds["capture"] = time.perf_counter() - start

    def _compile(self, module: VarlenEncoder, bucket: Bucket) -> None:
        """Compile once for all sizes. Without a C compiler, the module runs uncompiled, still in CUDA graphs."""
        import torch._inductor.config as inductor

        # A pool of compile processes starts `sys.executable`, which inside Triton is not Python.
        inductor.compile_threads = 1
        torch.compiler.reset()  # kernels of other modules would count towards its limit
        self._module = torch.compile(module, dynamic=True, fullgraph=True)
        try:
            self._warm(bucket)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each stage of torch.compile raises its own exceptions
            reason = str(error).strip().splitlines()
            say(f"torch.compile failed, the engine runs slower without it: {reason[0] if reason else error!r}")
            module.use_flash_attention()
            self._module, self._compiled = module, False

    @property
    def compiled(self) -> bool:
        return self._compiled

    def _warm(self, bucket: Bucket) -> None:
        """Run a bucket twice without capture: this selects and loads kernels, which a capture does not allow."""
        texts = max(1, min(MAX_TEXTS, bucket.tokens // self.layout.max_tokens))
        lengths = np.full(texts, min(self.layout.max_tokens, bucket.tokens // texts))
        host = np.zeros(self.layout.size, np.int32)
        self.layout.fill(host, np.zeros(int(lengths.sum()), np.int64), lengths, bucket)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._inputs.copy_(torch.from_numpy(host))
            for _ in range(2):
                self._forward(bucket)
        self._synchronize()

    def _capture(self, bucket: Bucket, pool: Any) -> Any:
        self._warm(bucket)
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: it empties the allocator's cache before each of the many captures.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._forward(bucket)
            finally:
                graph.capture_end()
        return graph

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
