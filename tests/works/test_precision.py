"""Mixed precision: autocast, scaled losses, models in bfloat16, channels last."""

import torch

from tests.works.matrix import (
    COLUMNS,
    assert_saves,
    assert_trains,
    build,
    calling,
    on,
    trained,
)


def under_autocast(dtype):
    def call(model):
        def forward(x):
            with torch.autocast("cpu", dtype):
                return model(x)

        return forward

    return call


@on(*COLUMNS)
def test_autocast_in_bfloat16(column):
    case, call = build(column), under_autocast(torch.bfloat16)

    assert_saves(case, call(case.ours), call(case.stock), ratio=4)
    assert_trains(case, calling(lambda model, x: call(model)(x)))
    assert {p.grad.dtype for p in trained(case.ours).values()} == {torch.float32}


@on(*COLUMNS)
def test_autocast_in_float16_with_a_gradient_scaler(column):
    """The first step overflows, is skipped, and the scale falls."""
    case, call = build(column), under_autocast(torch.float16)
    scalers, skipped = {}, {case.stock: [], case.ours: []}

    def step(case, model, optimizer):
        if model not in scalers:
            scalers[model] = torch.amp.GradScaler(
                "cpu", init_scale=2.0**40, backoff_factor=2.0**-14
            )
        scaler = scalers[model]
        before = {n: p.detach().clone() for n, p in trained(model).items()}
        optimizer.zero_grad()
        loss = case.loss(call(model))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        skipped[model].append(all(torch.equal(p, before[n]) for n, p in trained(model).items()))
        return loss

    assert_trains(case, step)
    assert skipped[case.ours] == skipped[case.stock]
    assert skipped[case.ours][0] and not any(skipped[case.ours][2:])


@on(*COLUMNS)
def test_a_model_in_bfloat16(column):
    case = build(column)
    case.x = case.x.bfloat16()
    for model in (case.stock, case.ours):
        model.bfloat16()
    assert_saves(case, ratio=4)
    large = column == "vqt"  # a small step of its large bias is rounded off
    assert_trains(
        case, optimizer=lambda m: torch.optim.AdamW(m.parameters(), 3e-2 if large else 3e-3)
    )


@on("fast", "small", "low-bit", "frozen", "rep-net")
def test_channels_last(column):
    case = build(column, None if column == "rep-net" else "cnn")
    case.x = case.x.to(memory_format=torch.channels_last)
    for model in (case.stock, case.ours):
        model.to(memory_format=torch.channels_last)
    assert_saves(case)
    assert_trains(case)
