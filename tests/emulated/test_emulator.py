"""The emulator itself: what it computes by the documented semantics, and that each kind of mistake is named."""

import numpy as np
import pytest

from .build import KERNELS
from .kernels import Emulator, KernelError

SOURCE = """
#include "device.cuh"
COBRA_KERNEL(64, barrier_in_a_branch)(float* out) {
  if (threadIdx.x < 32) sync_block();
  out[threadIdx.x] = 1.f;
}
COBRA_EXPORT(barrier_in_a_branch)
COBRA_KERNEL(32, lane_that_left)(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = shuffle_xor((float)threadIdx.x, 1);
}
COBRA_EXPORT(lane_that_left)
COBRA_KERNEL(32, lane_outside_its_mask)(float* out) { out[threadIdx.x] = shuffle((float)threadIdx.x, 3, 0xffu); }
COBRA_EXPORT(lane_outside_its_mask)
COBRA_KERNEL(32, unwritten)(float* out) {
  COBRA_SHARED(room);
  out[threadIdx.x] = ((float*)room)[threadIdx.x];
}
COBRA_EXPORT(unwritten)
COBRA_KERNEL(64, exchanged)(float* out, int barrier) {
  COBRA_SHARED(room);
  float* values = (float*)room;
  values[threadIdx.x] = (float)threadIdx.x;
  if (barrier == 1) sync_warp();
  if (barrier == 2) sync_block();
  out[threadIdx.x] = values[threadIdx.x ^ 33];
}
COBRA_EXPORT(exchanged)
COBRA_KERNEL(32, misaligned)(const float* x, float4* out) { out[threadIdx.x] = load((const float4*)(x + 4 * threadIdx.x + 1)); }
COBRA_EXPORT(misaligned)
COBRA_KERNEL(32, outside)(const float* x, float* out, int n) { out[threadIdx.x] = x[threadIdx.x + n]; }
COBRA_EXPORT(outside)
COBRA_KERNEL(32, of_other_blocks)(float* out, float* sum, unsigned* arrived, int coherent) {
  COBRA_SHARED(room);
  out[blockIdx.x * 32 + threadIdx.x] = 1.f;
  if (coherent ? !last_block(arrived, (unsigned*)room) : blockIdx.x != 0) return;
  float v = 0.f;
  for (unsigned b = 0; b < gridDim.x; ++b) v += load_coherent(out + b * 32 + threadIdx.x);
  sum[threadIdx.x] = v;
}
COBRA_EXPORT(of_other_blocks)
COBRA_KERNEL(32, copied)(const float* x, float* out, int wait) {
  COBRA_SHARED(room);
  float* values = (float*)room;
  copy_ahead_16(values + 4 * threadIdx.x, x + 4 * threadIdx.x, threadIdx.x < 31);
  commit_copies();
  if (wait) wait_copies<0>();
  if (wait == 2) sync_warp();
  out[threadIdx.x] = values[4 * (threadIdx.x ^ 1)];
  wait_copies<0>();
}
COBRA_EXPORT(copied)
COBRA_KERNEL(32, multiplied)(const half* a, const half* b, float* d) {  // (16, 16), (8, 16) and (16, 8)
  COBRA_SHARED(room);
  half *left = (half*)room, *right = left + 256;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  sync_warp();
  uint32_t w[4], x[4];
  load_matrices(w, left + (lane % 16) * 16 + lane / 16 * 8);
  load_matrices(x, right + (lane % 8) * 16 + lane / 8 % 2 * 8);
  const uint32_t pair[2] = {x[0], x[1]};
  float sum[4] = {};
  mma_16x8x16(sum, w, pair);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
COBRA_EXPORT(multiplied)
COBRA_KERNEL(32, transposed)(const half* a, half* out) {  // four (8, 8)
  COBRA_SHARED(room);
  half* rows = (half*)room;
  for (int i = threadIdx.x; i < 256; i += 32) rows[i] = a[i];
  sync_warp();
  uint32_t r[4];
  load_matrices_transposed(r, rows + 8 * threadIdx.x);
  for (int i = 0; i < 4; ++i) store((uint32_t*)(out + i * 64 + 2 * threadIdx.x), r[i]);
}
COBRA_EXPORT(transposed)
COBRA_KERNEL(1, integers)(int* out) {
  out[0] = dot4(0x80ff017fu, 0x02030405u, 7);           // -128 * 2 - 1 * 3 + 1 * 4 + 127 * 5 + 7
  out[1] = dot4_unsigned(0x80ff017fu, 0xfe030405u, 7);  // 128 * -2 + 255 * 3 + 1 * 4 + 127 * 5 + 7
  out[2] = (int)permute_bytes(0x33221100u, 0x77665544u, 0x7052u);
  out[3] = round_to_int(2.5f) + 10 * round_to_int(-3.5f);
}
COBRA_EXPORT(integers)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.cu").write_text(SOURCE)
    (folder / "device.cuh").write_bytes((KERNELS / "device.cuh").read_bytes())
    return Emulator("checked", folder)


def out(n=64):
    return np.full(n, np.nan, np.float32)


@pytest.mark.parametrize(
    "name, threads, says",
    [
        ("barrier_in_a_branch", 64, "not all of them reach"),
        ("lane_that_left", 32, "not all of them reach|a lane that has ended"),
        ("lane_outside_its_mask", 32, "not in the mask"),
    ],
)
def test_what_not_all_threads_reach(tiny, name, threads, says):
    with pytest.raises(KernelError, match=says):
        tiny.run(name, 1, threads, out())


def test_shared_memory_begins_as_nan(tiny):
    found = np.zeros(32, np.float32)
    tiny.run("unwritten", 1, 32, found, shared=128)
    assert np.isnan(found).all()


def test_only_a_barrier_of_the_block_orders_two_warps(tiny):
    for barrier in (0, 1):
        with pytest.raises(KernelError, match="race"):
            tiny.run("exchanged", 1, 64, out(), barrier, shared=256)
    found = out()
    tiny.run("exchanged", 1, 64, found, 2, shared=256)
    assert np.array_equal(found, np.arange(64) ^ 33)


def test_accesses_that_are_misaligned_or_outside(tiny):
    with pytest.raises(KernelError, match="misaligned"):
        tiny.run("misaligned", 1, 32, np.zeros(200, np.float32), np.zeros(128, np.float32))
    tiny.run("outside", 1, 32, np.zeros(40, np.float32), out(32), 8)
    with pytest.raises(KernelError, match="out of bounds"):
        tiny.run("outside", 1, 32, np.zeros(40, np.float32), out(32), 9)
    with pytest.raises(KernelError, match="out of bounds"):
        tiny.run("unwritten", 1, 32, out(32), shared=127)


def test_what_another_block_wrote_is_there_for_the_last_one_alone(tiny):
    with pytest.raises(KernelError, match="race"):
        tiny.run("of_other_blocks", 3, 32, out(96), out(32), np.zeros(1, np.uint32), 0, shared=16)
    total = out(32)
    tiny.run("of_other_blocks", 3, 32, out(96), total, np.zeros(1, np.uint32), 1, shared=16)
    assert (total == 3).all()


def test_a_copy_ahead_is_there_once_it_is_waited_for(tiny):
    x = np.arange(128, dtype=np.float32)
    with pytest.raises(KernelError, match="copy under way|race"):
        tiny.run("copied", 1, 32, x, out(32), 0, shared=512)
    with pytest.raises(KernelError, match="race"):  # others see it behind a barrier
        tiny.run("copied", 1, 32, x, out(32), 1, shared=512)
    found = out(32)
    tiny.run("copied", 1, 32, x, found, 2, shared=512)
    expected = x[::4][np.arange(32) ^ 1]
    expected[30] = 0  # the one that was not valid
    assert np.array_equal(found, expected)


def test_tensor_cores_and_matrices_by_the_ptx_manual(tiny):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float16)
    d = np.full((16, 8), np.nan, np.float32)
    tiny.run("multiplied", 1, 32, a, b, d, shared=768)
    assert np.allclose(d, a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-5)
    four = rng.standard_normal((4, 8, 8)).astype(np.float16)
    turned = np.zeros((4, 8, 8), np.float16)
    tiny.run("transposed", 1, 32, four, turned, shared=512)
    assert np.array_equal(turned, four.transpose(0, 2, 1))


def test_integers(tiny):
    found = np.zeros(4, np.int32)
    tiny.run("integers", 1, 1, found)
    assert found.tolist() == [-256 - 3 + 4 + 635 + 7, -256 + 765 + 4 + 635 + 7, 0x77005522, 2 - 40]


def test_a_launch_that_no_gpu_takes(tiny):
    for grid, threads, shared in ((0, 32, 0), (1, 2048, 0), (1, 32, 1 << 20)):
        with pytest.raises(KernelError):
            tiny.run("unwritten", grid, threads, out(32), shared=shared)
    with pytest.raises(KernelError, match="parameters"):
        tiny.run("unwritten", 1, 32)
    with pytest.raises(KernelError, match="no kernel"):
        tiny.run("absent", 1, 32)
