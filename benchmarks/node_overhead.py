"""What the black-box rule costs beside the box itself, and beside what people write by hand.

    python benchmarks/node_overhead.py

B = 128 rows, d = 16 inputs, m = 12 outputs. Forward: the rewritten node against a bare `session.run`. Backward: against
one raw call of the box with the same number of stacked rows. Loop: finite differences, one call per sample and
coordinate. Best of many, alternating in one process.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rewriter import BlackBox, OnnxBox, Plan, rewrite

ROWS, WIDTH, OUTPUTS = 128, 16, 12


def mlp_file(folder, hidden=64):
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, OUTPUTS)]
    if hidden > 64:
        layers[2:2] = [nn.Linear(hidden, hidden), nn.Tanh()]
    model = nn.Sequential(*layers).eval()
    path = Path(folder) / f"mlp{hidden}.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model,
        (torch.randn(4, WIDTH),),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch},),
        input_names=["x"],
        output_names=["y"],
    )
    return path


class Boxed(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.box = OnnxBox(path)

    def forward(self, x):
        return self.box(x)


def best(*calls, rounds=20, inner=20):
    """Minimum time of each call in seconds; the calls take turns in short runs, so that each finds its caches warm."""
    found = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            for _ in range(inner):
                start = time.perf_counter()
                call()
                found[index] = min(found[index], time.perf_counter() - start)
    return found


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = mlp_file(folder)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, one thread")
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        v = torch.randn(ROWS, OUTPUTS)
        array = x.detach().numpy()
        for probes, bound in ((1, 250e-6), (16, 600e-6)):
            step = rewrite(Boxed(path), Plan([BlackBox("box", probes=probes)]), example=(x,))
            for _ in range(30):  # the step size is measured in the first backward
                step(x).backward(v)
            region = step.latest.emitted.regions["box"]
            stacked = np.random.default_rng(0).normal(size=(probes * ROWS, WIDTH)).astype(np.float32)

            def both():
                region(x).backward(v)  # noqa: B023

            forward, whole, raw, raw_stacked = best(
                lambda: region(x),  # noqa: B023
                both,
                lambda: session.run(None, {"x": array}),
                lambda: session.run(None, {"x": stacked}),  # noqa: B023
            )
            backward = whole - forward - raw_stacked
            print(
                f"q = {probes:2}: forward {forward * 1e6:.0f} us, {(forward - raw) * 1e6:.0f} us over the raw call "
                f"(bound 40); backward {(whole - forward) * 1e6:.0f} us, {backward * 1e6:.0f} us over the raw stacked "
                f"call of {raw_stacked * 1e6:.0f} us (bound {bound * 1e6 + 0.1 * raw_stacked * 1e6:.0f})"
            )
        floor(session, x, v, raw)
        loop(session, array, v.numpy(), x)
        slow_box(folder, x, v)


def floor(session, x, v, raw):
    """The least that PyTorch lets one pay: a bare autograd.Function with a backward that returns a constant."""

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            outputs = torch.from_numpy(session.run(None, {"x": values.detach().numpy()})[0])
            ctx.save_for_backward(values, outputs)
            return outputs

        @staticmethod
        def backward(ctx, cotangent):
            ctx.saved_tensors  # noqa: B018
            return nothing

    nothing = torch.zeros(ROWS, WIDTH)
    forward, whole = best(lambda: Bare.apply(x), lambda: Bare.apply(x).backward(v))
    print(
        f"bare autograd.Function: forward {(forward - raw) * 1e6:.0f} us over the raw call, "
        f"backward {(whole - forward) * 1e6:.0f} us without any query"
    )


def slow_box(folder, x, v):
    """A box of several milliseconds: what share of the time is ours?"""
    path = mlp_file(folder, hidden=1280)
    step = rewrite(Boxed(path), Plan([BlackBox("box")]), example=(x,))
    for _ in range(3):
        step(x).backward(v)
    region, session = step.latest.emitted.regions["box"], step.model.box._session
    array = x.detach().numpy()
    forward, whole, raw = best(
        lambda: region(x), lambda: region(x).backward(v), lambda: session.run(None, {"x": array}), rounds=10, inner=10
    )
    print(
        f"box of {raw * 1e3:.1f} ms: backward with one probe {(whole - forward) / raw:.3f} x the raw call (bound 1.15)"
    )


def loop(session, array, v, x):
    """Exact differences by hand, one call per sample and coordinate, against one stacked call of the rule."""
    step = rewrite(
        Boxed(session._model_path), Plan([BlackBox("box", probes=WIDTH, directions="coordinate")]), example=(x,)
    )
    cotangent = torch.from_numpy(v)
    for _ in range(3):
        step(x).backward(cotangent)

    def by_hand():
        gradient = np.zeros_like(array)
        for row in range(ROWS):
            for k in range(WIDTH):
                plus, minus = array[row : row + 1].copy(), array[row : row + 1].copy()
                plus[0, k] += 1e-2
                minus[0, k] -= 1e-2
                difference = session.run(None, {"x": plus})[0] - session.run(None, {"x": minus})[0]
                gradient[row, k] = (difference[0] * v[row]).sum() / 2e-2
        return gradient

    region = step.latest.emitted.regions["box"]
    hand, mine = best(by_hand, lambda: region(x).backward(cotangent), rounds=10, inner=5)
    print(f"per-sample, per-coordinate loop {hand * 1e3:.1f} ms, rule {mine * 1e3:.2f} ms: {hand / mine:.0f} x")


if __name__ == "__main__":
    main()
