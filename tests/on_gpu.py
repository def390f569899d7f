"""What every kernel must survive on a GPU: a step under the synchronisation debugger, and capture in a CUDA graph."""

import torch


def step_of(call, inputs):
    """call(inputs), for which what a step moves (CoDIR's banks) is put back first: a replay comes after another number of
    steps than the launch that it is compared with."""
    first = {name: value.clone() for name, value in inputs.items() if name.startswith("bank")}

    def step():
        for name, value in first.items():
            inputs[name].copy_(value)
        return call(inputs)

    return step


def never_waits(step) -> None:
    step()  # compiled outside
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays(step, inputs=(), others=()) -> None:
    """step() gives tensors made of `inputs`. Captured on these, replayed on the values of `others`: bitwise what plain launches
    give, so no buffer or number is baked in."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            list(step())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = list(step())
    for x, other in zip(inputs, others, strict=True):
        x.copy_(other)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
