"""The native CPU kernels: every instruction set this machine runs, put back after each test."""

import pytest


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    native = pytest.importorskip("memtl._C", reason="memtl was installed without native kernels")
    if request.param not in native.isas():
        pytest.skip(f"{request.param} cannot be used here")
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
