"""The FFN of a split layer: hot neurons on the accelerator, cold ones on the host, both at once.

They are started together and joined once. The selection is made on the accelerator, which has the
whole predictor; the host gets the vector and its own part of the mask in one copy. What is hot is
the placement's to say. Dimensions: N tokens, D model width, F neurons, C cold neurons.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from predictor import Predictor

from .accelerator import Accelerator, Pending, Stamp
from .config import Mode
from .ffn import DenseFFN, ResidualFFN

if TYPE_CHECKING:  # Triton may not be installed
    from .kernels.cuda import CudaSelector

X_BYTES = 4  # activations cross in fp32


@dataclass(frozen=True)
class _Crossing:
    """Views of the exchange's buffers for a step of N tokens and one layer's cold neurons."""

    down_x_ND: Tensor  # on the accelerator: to be sent
    down_mask_NC: Tensor
    host_x_ND: Tensor  # on the host: arrived
    host_mask_NC: Tensor
    host_y_ND: Tensor  # on the host: to be sent back
    up_y_ND: Tensor  # on the accelerator: arrived
    down: Tensor  # x and mask as one run of bytes, on the accelerator and on the host
    host: Tensor


@dataclass
class LayerTrace:
    """When things happened in one layer's step: moments of the accelerator, seconds of the host."""

    selected: Pending[Stamp]  # attention and selection are done
    arrived: Stamp  # the copy to the host is
    hot_done: Pending[Stamp] | None = None
    joined: Pending[Stamp] | None = None  # the host is done
    wait_s: float = 0.0  # the host waited for the copy
    cold_s: float = 0.0  # the host computed

    def seconds(self, before: Pending[Stamp] | None) -> dict[str, float]:
        """Where the layer's time went; `before`: when the layer before was joined."""
        assert self.hot_done is not None
        assert self.joined is not None
        selected, hot, joined = (p.result() for p in (self.selected, self.hot_done, self.joined))
        start = selected if before is None else before.result()
        return {
            "select": selected.seconds_since(start),
            "transfer": self.arrived.seconds_since(selected),
            "gpu": hot.seconds_since(selected),
            "cpu": self.cold_s,
            "wait": self.wait_s,
            "both": joined.seconds_since(selected),
        }


class Exchange:
    """The buffers through which a layer's vectors cross. All layers use the same: a layer's are
    read before the next one's are written, because each step waits for the one before."""

    def __init__(self, accelerator: Accelerator, max_tokens: int, d_model: int, max_cold: int):
        self.accelerator = accelerator
        self._d_model = d_model
        num_bytes = max_tokens * (X_BYTES * d_model + max_cold)
        self._down = torch.empty(num_bytes, dtype=torch.uint8, device=accelerator.device)
        self._host = accelerator.host_buffer(num_bytes, dtype=torch.uint8)
        self._y_ND = accelerator.host_buffer(max_tokens, d_model, dtype=torch.float32)
        self._up_ND = torch.empty(max_tokens, d_model, device=accelerator.device)
        self.copies = accelerator.copy_stream()
        self.traces: list[LayerTrace] | None = None  # a list: steps are timed, layer by layer

    @property
    def num_bytes(self) -> int:
        """What the accelerator holds of it."""
        return self._down.nbytes + self._up_ND.nbytes

    def crossing(self, num_tokens: int, num_cold: int) -> _Crossing:
        N, D = num_tokens, self._d_model
        x_bytes = X_BYTES * N * D
        end = x_bytes + N * num_cold
        if end > len(self._down) or len(self._y_ND) < N:
            raise ValueError(
                f"{N} tokens with {num_cold} cold neurons do not fit the exchange's buffers"
            )

        def split(buffer: Tensor) -> tuple[Tensor, Tensor]:
            x_ND = buffer[:x_bytes].view(torch.float32).view(N, D)
            return x_ND, buffer[x_bytes:end].view(torch.bool).view(N, num_cold)

        return _Crossing(
            *split(self._down), *split(self._host), self._y_ND[:N], self._up_ND[:N],
            self._down, self._host,
        )  # fmt: skip

    def send(self, crossing: _Crossing, has_mask: bool) -> None:
        """Start the copy to the host, behind what was started on the accelerator."""
        end = crossing.down_x_ND.nbytes + (crossing.down_mask_NC.nbytes if has_mask else 0)
        selected = None if self.traces is None else self.accelerator.stamp()
        self.copies.copy(crossing.host[:end], crossing.down[:end])
        if self.traces is not None and selected is not None:
            self.traces.append(LayerTrace(selected, self.copies.stamp()))

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Wait for what was sent; around what the host does with it."""
        if self.traces is None:
            self.copies.wait()
            yield
            return
        trace = self.traces[-1]
        trace.hot_done = self.accelerator.stamp()
        start = time.perf_counter()
        self.copies.wait()
        received = time.perf_counter()
        yield
        trace.wait_s, trace.cold_s = received - start, time.perf_counter() - received
        trace.joined = self.accelerator.stamp()


class HybridFFN(ResidualFFN):
    """Hot neurons [:num_hot] on the accelerator, cold ones on the host."""

    def __init__(
        self,
        hot: DenseFFN | None,
        cold: DenseFFN,
        predictor: Predictor | None,
        exchange: Exchange,
        selector: CudaSelector | None = None,
    ) -> None:
        """`hot` None: only selection and attention are the accelerator's. `predictor`, of all
        neurons in the order of the placement, lies on the accelerator; `selector` is the same
        by the Triton kernels."""
        self.hot, self.cold = hot, cold
        self.predictor, self._selector = predictor, selector
        self.num_hot = 0 if hot is None else hot.num_hot
        self.exchange, self._accelerator = exchange, exchange.accelerator
        self._num_cold = cold.num_neurons

    def forward(self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None) -> Tensor:
        exchange, on_host = self.exchange, self._accelerator.on_host
        crossing = exchange.crossing(len(x_ND), self._num_cold)
        if mode == "predicted" and selected_NF is None:
            selected_NF = self.select(x_ND)
        crossing.down_x_ND.copy_(x_ND)
        hot_NF = None
        if selected_NF is not None:
            hot_NF = selected_NF[:, : self.num_hot]
            crossing.down_mask_NC.copy_(selected_NF[:, self.num_hot :])
        mask_NC = None if selected_NF is None else crossing.host_mask_NC

        def send() -> None:
            exchange.send(crossing, has_mask=mask_NC is not None)

        def compute_cold() -> None:
            with exchange.receiving():
                self.cold.forward_into(crossing.host_y_ND, crossing.host_x_ND, mode, mask_NC)

        def send_and_compute() -> None:
            send()
            compute_cold()

        hot = self.hot
        if hot is None:
            on_host(send_and_compute)
            return self._arrived(crossing).clone()
        on_host(send)
        y_ND: Pending[Tensor] = self._accelerator.start(lambda: hot.forward(x_ND, mode, hot_NF))
        on_host(compute_cold)
        return self._arrived(crossing) + y_ND.result()

    def _arrived(self, crossing: _Crossing) -> Tensor:
        """The cold part, on the accelerator until the next layer's arrives."""
        return crossing.up_y_ND.copy_(crossing.host_y_ND, non_blocking=True)

    def prefill(
        self, x_ND: Tensor, mode: Mode, selected_NF: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both sides by torch products; the accelerator is queued first, so they overlap."""
        if mode == "predicted" and selected_NF is None:
            selected_NF = self.select(x_ND)
        hot_NF, cold_NF = self._halves(selected_NF)
        host_x_ND = x_ND.cpu()
        hot = self.hot
        if hot is None:
            cold_y_ND, cold_h_NF = self.cold.prefill(host_x_ND, mode, cold_NF)
            return cold_y_ND.to(x_ND.device), cold_h_NF.to(x_ND.device)
        started = self._accelerator.start(lambda: hot.prefill(x_ND, mode, hot_NF))
        cold_y_ND, cold_h_NF = self.cold.prefill(host_x_ND, mode, cold_NF)
        y_ND, h_NF = started.result()
        device = x_ND.device
        return y_ND + cold_y_ND.to(device), torch.cat((h_NF, cold_h_NF.to(device)), dim=1)

    def _halves(self, selected_NF: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if selected_NF is None:
            return None, None
        return selected_NF[:, : self.num_hot], selected_NF[:, self.num_hot :].cpu()

    def activations(self, x_ND: Tensor) -> Tensor:
        cold_NF = self.cold.activations(x_ND.cpu()).to(x_ND.device)
        return cold_NF if self.hot is None else torch.cat((self.hot.activations(x_ND), cold_NF), 1)

    def select(self, x_ND: Tensor) -> Tensor:
        if self._selector is not None:
            return self._selector.mask(x_ND)
        return self._own_predictor.select(x_ND)

    def scores(self, x_ND: Tensor) -> Tensor:
        if self._selector is not None:
            return self._selector.scores(x_ND)
        return self._own_predictor.score(x_ND)

    def exchange_neurons(self, hot: Tensor, cold: Tensor) -> None:
        """Hot neurons and as many cold ones change places, in the memory they have: recorded steps
        and kernels see it too. Between two steps."""
        assert self.hot is not None, "there are hot neurons"
        ours, theirs = self.hot.weights, self.cold.weights
        for a, b in (
            (ours.gate_FD, theirs.gate_FD),
            (ours.up_FD, theirs.up_FD),
            (ours.down_FD, theirs.down_FD),
        ):
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                raise TypeError("weights in 8 or 4 bits stay where they are")
            swap_rows(a, hot, b, cold - self.num_hot)
        if self.predictor is not None:
            rows = [getattr(self.predictor, name) for name in self.predictor.PER_NEURON]
            rows += self._selector.copied_rows if self._selector is not None else []
            for scores in rows:
                swap_rows(scores, hot, scores, cold)

    @property
    def threshold(self) -> float:
        return self._own_predictor.threshold

    def set_threshold(self, threshold: float) -> None:
        self.predictor = self._own_predictor.with_threshold(threshold)
        if self._selector is not None:
            self._selector.set_threshold(threshold)

    @property
    def _own_predictor(self) -> Predictor:
        assert self.predictor is not None, "the model checks modes before it comes here"
        return self.predictor


def swap_rows(a: Tensor, at_a: Tensor, b: Tensor, at_b: Tensor) -> None:
    """Rows `at_a` of `a` and `at_b` of `b` change places, wherever the two are."""
    at_a, at_b = at_a.to(a.device), at_b.to(b.device)
    kept = a[at_a]
    a[at_a] = b[at_b].to(a.device)
    b[at_b] = kept.to(b.device)
