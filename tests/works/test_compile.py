"""torch.compile: forward and backward, what AOTAutograd saves, and compiled steps."""

import pytest
import torch

from memtl.memory import saved_bytes
from tests.works.matrix import (
    LOSSY,
    Case,
    assert_follows,
    build,
    calling,
    on,
    train,
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiled(case: Case, **options) -> None:
    """Compiled, a model follows stock and keeps no more than eagerly; of stock so much less."""
    compiled = torch.compile(case.ours, **options)
    step = calling(lambda model, x: compiled(x))
    eager = saved_bytes(case.ours, case.x)
    stock = saved_bytes(case.stock, case.x)
    ours = train(case, case.ours, step, steps=5)
    assert_follows(ours, train(case, case.stock, steps=5), case.column)
    kept = saved_bytes(compiled, case.x)
    if case.column in LOSSY:
        assert 5 * kept <= stock
    # Where each layer keeps its own, as compiled code does: nothing is shared, nothing rebuilt.
    assert 0 < kept <= (1.02 * eager if case.column == "fast" else stock)


@on("fast", "low-bit", "checkpoint", "frozen", "vqt")
def test_one_graph_of_forward_and_backward(column):
    """AOTAutograd traces both and decides by its partitioner what is saved between them."""
    case = build(column, "one block")
    if column == "checkpoint":
        with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
            torch.compile(case.ours, fullgraph=True, backend="aot_eager")(case.x)
        return
    assert_compiled(case, fullgraph=True, backend="aot_eager")


@on("fast")
def test_inductor(column):
    """The default backend, which generates code."""
    assert_compiled(build(column, "one block"))
