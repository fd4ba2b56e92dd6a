"""Frameworks write to the environment; the tests after theirs find it as it was."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def environment():
    """Puts every variable back: peft's BOFT, for one, leaves CXX=gcc, which links no C++."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
