"""Cases of kernels on a real driver: its harness, tried on the fake one."""

import numpy as np
import pytest

from cobra_edge.errors import MachineError

from ..tolerance import assert_close
from . import real_gpu
from .kernels import KernelError
from .matrices import random_matrix
from .test_gemv import activations, multiply


@pytest.fixture
def kernels(gpu, monkeypatch):
    """Give the harness a driver, whose kernels are an image of the GPU's that is plugged in."""
    monkeypatch.setenv(real_gpu.VARIABLE, "sm_89")
    real_gpu.real_gpu.cache_clear()
    yield real_gpu.RealKernels
    real_gpu.real_gpu.cache_clear()


def test_a_kernel_gets_its_arrays_and_they_come_back(kernels):
    matrix, x, out = random_matrix("w4a16-g64", 70, 384), activations(384), np.full(70, np.nan, np.float32)
    multiply(kernels(), matrix, x, out)
    assert_close(out, matrix.dense @ x, "product", "int16")


def test_an_array_stays_on_the_gpu_under_its_address(kernels):
    there, array = kernels(), np.arange(7, dtype=np.float32)
    address = there.address_of(array)
    assert address % 256 == 0 and np.array_equal(there.fetch(address, array), array)


def test_what_is_written_outside_of_an_array_is_an_error(kernels):
    matrix, tokens = random_matrix("fp16", 4, 64), np.array([1, 2], np.int32)
    there, whole = kernels(), np.empty((2, 64), np.float32)
    there.run("embed_rows_w16", 2, 128, *matrix.arrays, None, tokens, whole, 64, 31)
    assert np.array_equal(whole, matrix.dense[tokens])
    with pytest.raises(KernelError, match="embed_rows_w16 wrote outside of an array of 256 bytes"):
        there.run("embed_rows_w16", 2, 128, *matrix.arrays, None, tokens, np.empty((1, 64), np.float32), 64, 31)


def test_an_image_that_is_not_there_is_refused_with_those_that_are(kernels, monkeypatch):
    monkeypatch.setenv(real_gpu.VARIABLE, "sm_91")
    with pytest.raises(MachineError, match="COBRA_REAL_GPU=sm_91: kernels.xz has sm_80, sm_87, sm_89, compute_80; name one"):
        kernels()


def test_what_only_the_fake_driver_counts_skips_a_test():
    driver = real_gpu.RealDriver()
    driver.seed(1)
    with pytest.raises(pytest.skip.Exception, match="only the fake driver has launches"):
        _ = driver.launches
