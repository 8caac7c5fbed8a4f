"""A training job that can be stopped at any step and goes on where it was: PyTorch, or numpy.

    intentctl jobs submit --gpus 1-4 --size 10m --checkpoint-signal SIGTERM --grace 30s \\
        --workdir /shared/run1 -- python examples/jobs/train.py --steps 2000

Three things make a job elastic: it saves and ends when it is asked to (SIGTERM here), it loads what
it saved when it starts, and it says how far it is. How many GPUs it has may differ from start to
start; the batch is split accordingly. Without a GPU it trains on the CPU, without PyTorch the
same small network in numpy.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import time
from typing import Any, Protocol

import numpy as np

from intentd.daemons.gpu.client.checkpoint import load, save
from intentd.daemons.gpu.client.progress import gpus, report

INPUTS, HIDDEN, BATCH, RATE = 16, 32, 256, 0.05


class Model(Protocol):
    """Two layers that learn a fixed random function."""

    def step(self, x: Any, y: Any) -> float: ...

    def state(self) -> bytes: ...

    def restore(self, data: bytes) -> None: ...


class TorchModel:
    """On the GPUs of this run if there are any."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        layers = torch.nn.Sequential(
            torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1)
        ).to(self.device)
        many = torch.cuda.device_count() > 1
        self.net = torch.nn.DataParallel(layers) if many else layers
        self.layers = layers
        self.optimizer = torch.optim.SGD(layers.parameters(), lr=RATE, momentum=0.9)

    def step(self, x: Any, y: Any) -> float:
        torch = self.torch
        data = torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)
        loss = torch.nn.functional.mse_loss(self.net(data[0]), data[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def state(self) -> bytes:
        target = io.BytesIO()
        whole = {"net": self.layers.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.torch.save(whole, target)
        return target.getvalue()

    def restore(self, data: bytes) -> None:
        whole = self.torch.load(io.BytesIO(data), map_location=self.device, weights_only=True)
        self.layers.load_state_dict(whole["net"])
        self.optimizer.load_state_dict(whole["optimizer"])


class NumpyModel:
    """The same without PyTorch: plain gradient descent with momentum."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights = [
            rng.normal(0, 0.25, (INPUTS, HIDDEN)),
            np.zeros(HIDDEN),
            rng.normal(0, 0.18, (HIDDEN, 1)),
            np.zeros(1),
        ]
        self.speeds = [np.zeros_like(weight) for weight in self.weights]

    def step(self, x: Any, y: Any) -> float:
        first, bias, second, offset = self.weights
        hidden = np.tanh(x @ first + bias)
        off = hidden @ second + offset - y
        slope = 2 * off / len(x)
        back = (slope @ second.T) * (1 - hidden**2)
        slopes = [x.T @ back, back.sum(0), hidden.T @ slope, slope.sum(0)]
        for at, slope in enumerate(slopes):
            self.speeds[at] = 0.9 * self.speeds[at] + slope
            self.weights[at] -= RATE * self.speeds[at]
        return float((off**2).mean())

    def state(self) -> bytes:
        target = io.BytesIO()
        np.savez(target, *self.weights, *self.speeds)
        return target.getvalue()

    def restore(self, data: bytes) -> None:
        with np.load(io.BytesIO(data)) as kept:
            arrays = [kept[name] for name in kept.files]
        half = len(arrays) // 2
        self.weights, self.speeds = arrays[:half], arrays[half:]


def make_model(backend: str) -> Model:
    if backend in ("torch", "any"):
        try:
            return TorchModel()
        except ImportError:
            if backend == "torch":
                raise
    return NumpyModel()


def batch(step: int) -> tuple[Any, Any]:
    """The same for a step whenever it is computed, so that a resumed run learns the same."""
    rng = np.random.default_rng(step)
    x = rng.normal(size=(BATCH, INPUTS)).astype(np.float32)
    return x, np.sin(x.sum(axis=1, keepdims=True) / 4).astype(np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--backend", choices=("any", "torch", "numpy"), default="any")
    parser.add_argument("--save-every-s", type=float, default=30.0)
    parser.add_argument("--pace-s", type=float, default=0.0, help="at least so long a step")
    arguments = parser.parse_args()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    model = make_model(arguments.backend)
    step, kept = 0, load()
    if kept is not None:
        step = int.from_bytes(kept[:8], "big")
        model.restore(kept[8:])
    print(f"step {step} of {arguments.steps} on GPUs {gpus()}, {type(model).__name__}", flush=True)
    saved_s, loss = time.monotonic(), 0.0
    while step < arguments.steps and not asked:
        loss = model.step(*batch(step))
        step += 1
        report(step, arguments.steps)
        if arguments.pace_s:
            time.sleep(arguments.pace_s)
        if time.monotonic() - saved_s >= arguments.save_every_s:
            save(step.to_bytes(8, "big") + model.state())
            saved_s = time.monotonic()
    save(step.to_bytes(8, "big") + model.state())
    print(f"step {step}, loss {loss:.6f}{', asked to end' if asked else ''}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
