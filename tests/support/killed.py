"""A run that can be killed at any moment and begun again, and a checksum of all that it ends with."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_elbo as pe

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "history", "epoch", "global_step")


class Programs(nn.Module):
    """An autoencoder with all that a checkpoint must hold: buffers, and noise of dropout beside that of the latent."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))
        self.decode = nn.Linear(2, 4)

    def model(self, x, s):
        pyro.module("programs", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 0.5).to_event(1), obs=x)

    def guide(self, x, s):
        pyro.module("programs", self)
        loc, raw = self.encode(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def train(folder: Path, epochs: int, save_every: int | None = None) -> None:
    """Train to the end, from where an earlier process was killed, and leave the checksum."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.clear_param_store()
    programs = Programs()
    s = torch.arange(90) % 2
    x = torch.randn(90, 4) + s[:, None]
    begun = any((folder / name).exists() for name in ("last.ckpt", "previous.ckpt"))
    penalty = pe.MutualInformation("z", lambda x, s: s, 1.0, "club", levels=2)
    pe.fit(
        programs.model,
        programs.guide,
        (x[:60], s[:60]),
        (x[60:], s[60:]),
        loss=pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=3 * epochs // 2), penalties=[penalty]),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
        lr=0.03,
        batch_size=20,
        max_epochs=epochs,
        patience=epochs // 3,
        dir=folder,
        resume=begun,
        overwrite=not begun,
        save_every=save_every,
        progress=False,
    )
    (folder / "checksum").write_text(checksum(folder, programs))


def checksum(folder: Path, programs: nn.Module) -> str:
    """Return the SHA-256 of the restored parameters and buffers, and of the state of training."""
    last = torch.load(folder / "last.ckpt", weights_only=True)
    found = hashlib.sha256()
    _add(found, dict(programs.state_dict()))
    _add(found, {name: last[name] for name in PARTS})
    return found.hexdigest()


def _add(found: Any, x: Any) -> None:
    if isinstance(x, torch.Tensor):
        found.update(np.ascontiguousarray(x.detach().numpy()).tobytes())
    elif isinstance(x, Mapping):
        for name, part in x.items():
            found.update(str(name).encode())
            _add(found, part)
    elif isinstance(x, list | tuple):
        for part in x:
            _add(found, part)
    else:
        found.update(repr(x).encode())


def run(folder: Path, epochs: int, killed_after: float | None = None, save_every: int | None = None) -> bool:
    """Train in a process of its own, killed after so many seconds; return whether it came to its end."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, epochs, save_every))
    process.start()
    process.join(killed_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a process failed with exit code {process.exitcode}")
    return process.exitcode == 0
