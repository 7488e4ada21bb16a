"""linear, norm, attention and the thread pool of the C++ kernels, held to the fp32 reference.

Tolerances are derived: twice the error of the same formula in plain torch fp32, plus the
probabilistic rounding bound u sqrt(n) sum |a||b| of a dot product of n terms; both against fp64.
"""

import importlib
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

from runtime.kernels import KernelUnavailable, available_backends, cpu_backend, reference

cpu = pytest.importorskip("runtime.kernels.cpu", reason="the C++ extension is not built")
pytestmark = pytest.mark.usefixtures("one_thread")

UNIT_ROUNDOFF = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16]
BATCHES = [1, 2, 5, 17]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, columns) / columns**0.5).to(dtype)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def assert_close(result: Tensor, plain: Tensor, truth: Tensor, rounding: Tensor) -> None:
    """|result - truth| <= 2 max |plain - truth| + rounding, element by element."""
    error = (result.double() - truth).abs()
    bound = 2 * (plain.double() - truth).abs().max() + rounding
    where = (error - bound).argmax() if error.numel() else None
    message = f"error {error.flatten()[where]:.3e}, bound {bound.flatten()[where]:.3e} at {where}"
    assert bool((error <= bound).all()), message


def dot_rounding(x_ND: Tensor, w_OD: Tensor) -> Tensor:
    size = x_ND.shape[1] ** 0.5
    return UNIT_ROUNDOFF * size * (x_ND.double().abs() @ w_OD.double().abs().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize(("O", "D"), [(1, 1), (3, 17), (101, 577), (70, 64)])
def test_linear_matches_the_reference(
    isa: str,
    dtype: torch.dtype,
    N: int,
    O: int,
    D: int,
) -> None:
    x_ND, w_OD = torch.randn(N, D), matrix(O, D, dtype)
    result = cpu.linear(x_ND, w_OD, out=poisoned(N, O))
    truth = x_ND.double() @ w_OD.double().T
    assert_close(result, reference.linear(x_ND, w_OD), truth, dot_rounding(x_ND, w_OD))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 17, 576, 577])
def test_rms_norm_matches_the_reference(isa: str, dtype: torch.dtype, D: int) -> None:
    x_ND, weight_D = torch.randn(9, D), (1 + torch.randn(D) / 4).to(dtype)
    x = x_ND.double()
    truth = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight_D.double()
    result = cpu.rms_norm(x_ND, weight_D, 1e-5, out=poisoned(9, D))
    rounding = UNIT_ROUNDOFF * (4 + D**0.5) * truth.abs()
    assert_close(result, reference.rms_norm(x_ND, weight_D, 1e-5), truth, rounding)


def test_norm_linear_is_norm_then_linear(isa: str) -> None:
    x_ND, norm_D, w_OD = torch.randn(3, 65), torch.rand(65), matrix(30, 65, torch.bfloat16)
    expected = cpu.linear(cpu.rms_norm(x_ND, norm_D, 1e-5), w_OD)
    assert torch.equal(cpu.norm_linear(x_ND, norm_D, 1e-5, w_OD), expected)


def in_blocks(
    caches: list[Tensor], block_size: int, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """The same keys and values in one pool, blocks in any order: (pools, tables) of a KvBatch."""
    num_blocks = [-(-cache.shape[3] // block_size) for cache in caches]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(seed))
    tables = list(order.split(num_blocks))
    L, _, G, _, K = caches[0].shape
    pool = torch.full((len(order), L, 2, G, block_size, K), torch.nan, dtype=caches[0].dtype)
    for cache, table in zip(caches, tables, strict=True):
        for i, block in enumerate(table.tolist()):
            rows = cache[:, :, :, i * block_size : (i + 1) * block_size]
            pool[block, :, :, :, : rows.shape[3]] = rows
    return [pool] * len(caches), tables


def in_one_run(pool: Tensor, table: Tensor, num_positions: int) -> Tensor:
    """A sequence's keys and values in order, [L, 2, G, S, K]."""
    return pool[table].movedim(0, 3).flatten(3, 4)[:, :, :, :num_positions]


class AttentionCase:
    """Sequences of given lengths with random caches of 2 layers; the token is at the last row."""

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype,
        H: int = 6,
        G: int = 2,
        K: int = 16,
        block_size: int = 32,
    ) -> None:
        self.block_size = block_size
        self.H, self.G, self.K, self.dtype, N = H, G, K, dtype, len(lengths)
        self.positions = [length - 1 for length in lengths]
        self.caches = [torch.randn(2, 2, G, length + 3, K).to(dtype) for length in lengths]
        angle_SK = torch.rand(max(lengths), K // 2) * 6
        self.cos_SK, self.sin_SK = angle_SK.cos(), angle_SK.sin()
        self.qkv_NC = torch.randn(N, (H + 2 * G) * K)
        for cache, length in zip(self.caches, lengths, strict=True):
            cache[:, :, :, length - 1 :] = torch.nan  # the token's own row and what is not filled

    def run(self, tokens: slice = slice(None)) -> Tensor:
        pools, tables = in_blocks(self.caches[tokens], self.block_size, seed=tokens.start or 0)
        kv = cpu.KvBatch(pools, tables, self.positions[tokens])
        qkv_NC = self.qkv_NC[tokens].clone()
        out = cpu.attention(qkv_NC, kv, 1, self.cos_SK, self.sin_SK, self.H)
        self.written = [
            in_one_run(pool, table, cache.shape[3])
            for pool, table, cache in zip(pools, tables, self.caches[tokens], strict=True)
        ]
        return out

    def expected(self, n: int, float_type: torch.dtype) -> Tensor:
        """The reference on the keys and values that the kernel has stored."""
        p, H, G = self.positions[n], self.H, self.G
        heads_NHK = self.qkv_NC[n].to(float_type).view(1, -1, self.K)
        a, b = heads_NHK[:, : H + G].chunk(2, dim=-1)
        cos, sin = self.cos_SK[p].to(float_type), self.sin_SK[p].to(float_type)
        turned_HK = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)[0]
        k_GSK, v_GSK = self.written[n][1, :, :, : p + 1].to(float_type)
        score_HS = torch.einsum("hk,hsk->hs", turned_HK[:H], k_GSK.repeat_interleave(H // G, dim=0))
        weight_HS = (score_HS * self.K**-0.5).softmax(-1)
        v_HSK = v_GSK.repeat_interleave(H // G, dim=0)
        return torch.einsum("hs,hsk->hk", weight_HS, v_HSK).flatten()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [10, 64])
def test_attention_matches_the_reference(isa: str, dtype: torch.dtype, K: int) -> None:
    case = AttentionCase([1, 2, 127, 128, 129, 300], dtype, H=6, G=2, K=K)
    result = case.run()
    for n, position in enumerate(case.positions):
        truth, plain = case.expected(n, torch.float64), case.expected(n, torch.float32)
        # exp turns the score's absolute error into a relative one; values are about 1
        rounding = torch.full_like(truth, UNIT_ROUNDOFF * 8 * ((position + 1) ** 0.5 + K**0.5))
        assert_close(result[n], plain, truth, rounding)
        own_key = case.written[n][1, 0, :, position].float()
        turned = reference.rope(
            case.qkv_NC[n].view(1, -1, K)[:, case.H : case.H + case.G],
            case.cos_SK[position : position + 1],
            case.sin_SK[position : position + 1],
        )[0]
        torch.testing.assert_close(own_key, turned.to(dtype).float(), rtol=2**-7, atol=1e-6)
        own_value = case.qkv_NC[n].view(-1, K)[case.H + case.G :]
        assert torch.equal(case.written[n][1, 1, :, position], own_value.to(dtype))
        assert bool(case.written[n][0, :, :, position].isnan().all()), "another layer was written"
        assert bool(case.written[n][1, :, :, position + 1].isnan().all()), "wrote past the position"


def test_the_reference_attention_is_the_formula() -> None:
    case = AttentionCase([5], torch.float32)
    case.run()
    q_HK = reference.rope(
        case.qkv_NC.view(1, -1, case.K)[:, : case.H], case.cos_SK[4:5], case.sin_SK[4:5]
    )[0]
    k_GSK, v_GSK = case.written[0][1, :, :, :5]
    torch.testing.assert_close(
        reference.attention(q_HK, k_GSK, v_GSK).flatten(), case.expected(0, torch.float32)
    )


def test_nothing_depends_on_batch_mates_or_threads(isa: str) -> None:
    x_ND, w_OD = torch.randn(17, 577), matrix(203, 577, torch.bfloat16)
    case = AttentionCase([1, 40, 128, 300, 131], torch.bfloat16)
    cpu.set_num_threads(1)
    alone = torch.cat([cpu.linear(x_D[None], w_OD) for x_D in x_ND])
    attended = torch.cat([case.run(slice(n, n + 1)) for n in range(5)])
    for num_threads in (1, 2, 3):
        cpu.set_num_threads(num_threads)
        assert cpu.num_threads() == num_threads
        assert torch.equal(cpu.linear(x_ND, w_OD), alone)
        assert torch.equal(case.run(), attended)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_the_blocks(isa: str, dtype: torch.dtype) -> None:
    lengths = [1, 40, 128, 300, 131]
    case = AttentionCase(lengths, dtype)
    expected, written = case.run(), case.written
    for block_size in (1, 5, 16, 64, 100, 512):
        case.block_size = block_size
        assert torch.equal(case.run(), expected)
        for before, after in zip(written, case.written, strict=True):
            assert torch.equal(before.nan_to_num(7), after.nan_to_num(7))


def test_a_prompt_in_one_batch_equals_token_by_token() -> None:
    N, H, G, K = 7, 4, 2, 16
    qkv_NC, cos_SK, sin_SK = torch.randn(N, (H + 2 * G) * K), torch.rand(9, 8), torch.rand(9, 8)
    together, one_by_one = torch.zeros(2, 3, 1, 2, G, 3, K).bfloat16()
    table = torch.tensor([2, 0, 1])
    batch = cpu.KvBatch([together] * N, [table] * N, range(N))
    result = cpu.attention(qkv_NC.clone(), batch, 0, cos_SK, sin_SK, H)
    for n in range(N):
        kv = cpu.KvBatch([one_by_one], [table], [n])
        single = cpu.attention(qkv_NC[n : n + 1].clone(), kv, 0, cos_SK, sin_SK, H)
        assert torch.equal(single[0], result[n])
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_block_is_its_parts(isa: str, dtype: torch.dtype) -> None:
    D, H, G, K = 33, 4, 2, 8
    norm_D, qkv_CD = torch.rand(D), matrix((H + 2 * G) * K, D, dtype)
    o_DC, cos_SK, sin_SK = matrix(D, H * K, dtype), torch.rand(6, 4), torch.rand(6, 4)
    block = cpu.CpuAttention(
        0, norm_D, qkv_CD, o_DC, cos_SK, sin_SK, num_heads=H, num_kv_heads=G, eps=1e-6
    )
    x_ND = torch.randn(2, D)
    pool = torch.randn(4, 1, 2, G, 3, K).to(dtype)
    copy, tables = pool.clone(), [torch.tensor([0, 3]), torch.tensor([2, 1])]
    qkv_NC = cpu.linear(cpu.rms_norm(x_ND, norm_D, 1e-6), qkv_CD)
    out_NC = cpu.attention(qkv_NC, cpu.KvBatch([copy] * 2, tables, [3, 5]), 0, cos_SK, sin_SK, H)
    expected = x_ND + cpu.linear(out_NC, o_DC)
    block.forward(x_ND, cpu.KvBatch([pool] * 2, tables, [3, 5]))
    assert torch.equal(x_ND, expected)
    assert torch.equal(pool, copy)


def test_wrong_arguments_are_refused() -> None:
    x_ND, w_OD, pool = torch.randn(2, 8), matrix(4, 8), torch.zeros(2, 1, 2, 1, 4, 8)
    refused = [
        (r"x_ND must be float32; it is bfloat16", lambda: cpu.linear(x_ND.bfloat16(), w_OD)),
        (
            r"w_OD must be float32 or bfloat16; it is float64",
            lambda: cpu.linear(x_ND, w_OD.double()),
        ),
        (r"x_ND must be of shape \[any, 8\]", lambda: cpu.linear(x_ND[:, :7].contiguous(), w_OD)),
        (r"x_ND must be of shape", lambda: cpu.linear(x_ND[0], w_OD)),
        (r"w_OD must be contiguous", lambda: cpu.linear(x_ND, w_OD.T.contiguous().T)),
        (r"out must be of shape \[2, 4\]", lambda: cpu.linear(x_ND, w_OD, out=poisoned(2, 5))),
        (r"on the CPU", lambda: cpu.linear(x_ND.to("meta"), w_OD, out=poisoned(2, 4))),
        (r"w_OD must be a tensor", lambda: cpu._cpu_ext.linear(x_ND, "weights", poisoned(2, 4))),
        (r"norm weight must be of shape \[8\]", lambda: cpu.rms_norm(x_ND, torch.ones(7), 1e-5)),
        (r"one position per token", lambda: cpu.KvBatch([], [], [1])),
        (r"one table", lambda: cpu.KvBatch([pool], [], [1])),
        (
            r"Position 8 is outside a table of 2 blocks",
            lambda: cpu.KvBatch([pool], [torch.tensor([0, 1])], [8]),
        ),
        (
            r"no block 2 in a pool of 2",
            lambda: cpu.KvBatch([pool], [torch.tensor([0, 2])], [4]),
        ),
        (r"block table must be int64", lambda: cpu.KvBatch([pool], [torch.zeros(2)], [4])),
        (r"does not run the instruction set 'sse9'", lambda: cpu.force_isa("sse9")),
        (r"number of threads", lambda: cpu.set_num_threads(-1)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_positions_beyond_the_rotary_tables_are_refused() -> None:
    case = AttentionCase([9], torch.float32)
    case.cos_SK, case.sin_SK = case.cos_SK[:8], case.sin_SK[:8]
    with pytest.raises(ValueError, match="beyond the rotary tables"):
        case.run()


def test_the_slow_dlpack_path_reads_the_same() -> None:
    x_ND, w_OD = torch.randn(2, 8), matrix(4, 8)
    out = poisoned(2, 4)
    cpu._cpu_ext.linear(x_ND.numpy(), w_OD.numpy(), out.numpy())
    assert torch.equal(out, cpu.linear(x_ND, w_OD))


def test_more_threads_than_cores_and_concurrent_callers_agree() -> None:
    cpu.set_num_threads(9)
    x_ND, w_OD = torch.randn(3, 64), matrix(2000, 64)
    expected, failures = cpu.linear(x_ND, w_OD), []

    def call() -> None:
        for _ in range(30):
            if not torch.equal(cpu.linear(x_ND, w_OD), expected):
                failures.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_the_gil_is_released() -> None:
    x_ND, w_OD, out = torch.randn(32, 1024), matrix(20000, 1024), poisoned(32, 20000)
    beats: list[float] = []
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=beat)
    thread.start()
    deadline, inside = time.perf_counter() + 20, False
    while not inside and time.perf_counter() < deadline:
        begin = time.perf_counter()
        cpu.linear(x_ND, w_OD, out)
        end = time.perf_counter()
        inside = any(begin + 0.001 < beat < end - 0.001 for beat in list(beats))
    done.set()
    thread.join()
    assert inside, "no other thread ran during a kernel"


def test_huge_pages_hold_copies_that_outlive_them() -> None:
    memory = cpu.HugePages(1 << 20)
    tensors = [torch.randn(n, 3) for n in (1, 5, 200_000, 70_000)]  # two are above a block's rest
    copies = [memory.copy(tensor) for tensor in tensors]
    del memory
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() % cpu.ALIGNMENT == 0
    copies[0].zero_()
    assert torch.equal(copies[1], tensors[1])


def test_packed_tensors_are_copies_that_kernels_take() -> None:
    tensors = [matrix(3, 5), matrix(2000, 600, torch.bfloat16), torch.arange(7, dtype=torch.int8)]
    packed = cpu.pack(tensors)
    assert all(torch.equal(a, b) for a, b in zip(packed, tensors, strict=True))
    assert all(a.dtype == b.dtype for a, b in zip(packed, tensors, strict=True))
    x_ND, expected = torch.randn(2, 600), tensors[1].clone()
    assert torch.equal(cpu.linear(x_ND, packed[1]), cpu.linear(x_ND, tensors[1]))
    packed[0].zero_()
    packed[2].zero_()
    assert torch.equal(packed[1], expected), "the copies must not overlap"
    assert bool(tensors[0].any())


def test_idle_workers_sleep() -> None:
    cpu.set_num_threads(4)
    cpu.linear(torch.randn(3, 64), matrix(2000, 64))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_backends() == ("cpu", "torch")
    assert cpu_backend() is cpu
    monkeypatch.delitem(sys.modules, "runtime.kernels.cpu")
    monkeypatch.setitem(sys.modules, "runtime.kernels._cpu_ext", None)
    package = importlib.import_module("runtime.kernels")
    monkeypatch.delattr(package, "_cpu_ext", raising=False)
    assert available_backends() == ("torch",)
    with pytest.raises(KernelUnavailable, match="pip install --no-build-isolation"):
        cpu_backend()
