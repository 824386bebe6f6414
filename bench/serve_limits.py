"""What a token must cost on this machine: bytes, operations, calls; for bench/serve.py.

A token cannot be written faster than the weights it needs are read, nor than its products are
computed. Both speeds are measured here by one large product each, in the same process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from serve_sides import DENSE, OWN, PLAIN, RANK, SPARSE, GatedCache, Workshop
from torch import nn
from torch.autograd.profiler_legacy import profile
from torch.backends import mkldnn

__all__ = ["Need", "Shape", "count_need", "measure_calls", "measure_machine", "read_shape"]

_READ = (16_384, 8_192)  # a matrix larger than any cache of a processor
_COMPUTED = (1_024, 4_096, 4_096)
_REPEATS = 8


@dataclass(frozen=True)
class Shape:
    """What of a model decides the cost of a token.

    Attributes:
        linear: Outputs and inputs of every linear layer in the blocks.
        head: Numbers of the output head.
        num_layers: L, blocks that attend.
        query_width: Heads times their width.
        key_width: Heads of keys times their width.
        number_bytes: Bytes of a number.
    """

    linear: tuple[tuple[int, int], ...]
    head: int
    num_layers: int
    query_width: int
    key_width: int
    number_bytes: int


@dataclass(frozen=True)
class Need:
    """What one token of every text of a batch needs at least.

    Attributes:
        weight_bytes: The base's weights, read once.
        factor_bytes: Low-rank factors of all experts that run, read once.
        cache_bytes: Keys and values of the context, of every row.
        operations: Floating-point operations, two a multiplication and addition.
    """

    weight_bytes: int
    factor_bytes: int
    cache_bytes: int
    operations: int

    @property
    def total_bytes(self) -> int:
        """All bytes that are read."""
        return self.weight_bytes + self.factor_bytes + self.cache_bytes

    def limit(self, bytes_per_second: float, operations_per_second: float) -> float:
        """Seconds that a token takes at least: of the two, what takes longer."""
        return max(self.total_bytes / bytes_per_second, self.operations / operations_per_second)


def count_need(shape: Shape, *, adapters: int, rows: int, adapted_rows: int, context: int) -> Need:
    """What a token of each text needs.

    Args:
        shape: Of the model.
        adapters: Adapters of rank 16 on all linear layers whose factors are read.
        rows: Rows of the pass: texts times experts that run.
        adapted_rows: Of these, rows of an expert that is not the base.
        context: Tokens that each row looks back on.
    """
    weights = sum(outputs * inputs for outputs, inputs in shape.linear) + shape.head
    factors = RANK * sum(outputs + inputs for outputs, inputs in shape.linear)
    attention = 4 * shape.num_layers * shape.query_width * context
    cache = 2 * shape.num_layers * shape.key_width * context
    return Need(
        weight_bytes=shape.number_bytes * weights,
        factor_bytes=shape.number_bytes * factors * adapters,
        cache_bytes=shape.number_bytes * cache * rows,
        operations=rows * (2 * weights + attention) + adapted_rows * 2 * factors,
    )


def read_shape(model: Any) -> Shape:
    """The shape of a model of transformers."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return Shape(
        linear=tuple((layer.out_features, layer.in_features) for layer in layers),
        head=head.weight.numel(),
        num_layers=config.num_hidden_layers,
        query_width=heads * width,
        key_width=(getattr(config, "num_key_value_heads", None) or heads) * width,
        number_bytes=model.dtype.itemsize,
    )


def list_needs(shape: Shape, num_experts: int, context: int) -> dict[str, Need]:
    """Needs of a token of one text, by side."""
    base = count_need(shape, adapters=0, rows=1, adapted_rows=0, context=context)
    others = num_experts - 1
    return {
        PLAIN: base,
        OWN: base,
        DENSE: count_need(
            shape, adapters=others, rows=num_experts, adapted_rows=others, context=context
        ),
        SPARSE: count_need(shape, adapters=1, rows=1, adapted_rows=1, context=context),
    }


def measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The fastest of a few large products: bytes read and operations done in a second.

    Args:
        device: Where.
        dtype: Of the numbers; on a processor their matrix is packed as a model's weights are.
            Bytes are read in float32, too: how fast memory is does not depend on the dtype.
    """
    speeds = []
    for read_dtype in {dtype, torch.float32}:
        read = torch.randn(_READ, device=device, dtype=read_dtype)
        speeds.append(read.nbytes / _time_product(read, 1))
        del read
    rows, outputs, inputs = _COMPUTED
    computed = _time_product(torch.randn(outputs, inputs, device=device, dtype=dtype), rows)
    return {
        "bytes_per_second": max(speeds),
        "operations_per_second": 2 * rows * outputs * inputs / computed,
    }


@torch.inference_mode()
def _time_product(weight: torch.Tensor, rows: int) -> float:
    """Seconds of the fastest product of some rows with a matrix (D_out, D_in)."""
    inputs = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    ways: list[Callable[[], Any]] = [lambda: nn.functional.linear(inputs, weight)]
    can_pack = weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.device.type == "cpu" and mkldnn.is_available() and can_pack:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways.append(
            lambda: torch.ops.mkldnn._linear_pointwise(inputs, packed, None, "none", [], "")
        )
    seconds = []
    for _ in range(_REPEATS):
        for run in ways:
            start = time.perf_counter()
            run()
            if weight.device.type == "cuda":
                torch.cuda.synchronize(weight.device)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.inference_mode()
def measure_calls(workshop: Workshop, prompt: torch.Tensor) -> dict[str, int]:
    """Operators of torch that the model calls for one token, nested ones too, by side."""
    calls = {}
    models: Sequence[tuple[str, Any]] = (
        (PLAIN, workshop.base.model),
        (OWN, workshop.own),
        (DENSE, workshop.fused),
        (SPARSE, workshop.fused),
    )
    for name, model in models:
        given = {"past_key_values": GatedCache(model)} if name == SPARSE else {}
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **given)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        if name == SPARSE:
            cache.narrow(1)
        model(input_ids=token, past_key_values=cache)
        with profile() as recorded:
            model(input_ids=token, past_key_values=cache)
        calls[name] = sum(event.count for event in recorded.key_averages())
    return calls
