"""The VRNN of ``bench_sequences``: its parts, start and data, and its training step written by hand in torch.

The loss is the one that a specialist writes: only what the carry needs runs step by step; the features of x, the
prior, the decoder and the analytic KL run over all steps at once; all noise is drawn in one call; Adam is fused.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, softplus

X, H, Z = 88, 64, 16
LR = 1e-3

Step = Callable[[], float]
Normal = tuple[Tensor, Tensor]  # location and scale


class Cell(nn.Module):
    """The parts of one step. Chung et al. (2015), A recurrent latent variable model, arXiv:1506.02216."""

    def __init__(self) -> None:
        super().__init__()
        self.phi_x, self.phi_z = nn.Linear(X, H), nn.Linear(Z, H)
        self.prior_hidden, self.prior_out = nn.Linear(H, H), nn.Linear(H, 2 * Z)
        self.encoder_hidden, self.encoder_out = nn.Linear(2 * H, H), nn.Linear(H, 2 * Z)
        self.decoder_hidden, self.decoder_out = nn.Linear(2 * H, H), nn.Linear(H, X)
        self.gru = nn.GRUCell(2 * H, H)

    def start(self, batch: int) -> Tensor:
        return self.gru.bias_ih.new_zeros(batch, H)

    def features_x(self, x: Tensor) -> Tensor:
        return self.phi_x(x).relu()

    def features_z(self, z: Tensor) -> Tensor:
        return self.phi_z(z).relu()

    def prior(self, h: Tensor) -> Normal:
        return _normal(self.prior_out(self.prior_hidden(h).relu()))

    def encode(self, features_x: Tensor, h: Tensor) -> Normal:
        return _normal(self.encoder_out(self.encoder_hidden(torch.cat([features_x, h], -1)).relu()))

    def decode(self, features_z: Tensor, h: Tensor) -> Tensor:
        """The logits of x."""
        return self.decoder_out(self.decoder_hidden(torch.cat([features_z, h], -1)).relu())

    def advance(self, features_x: Tensor, features_z: Tensor, h: Tensor) -> Tensor:
        return self.gru(torch.cat([features_x, features_z], -1), h)


def _normal(raw: Tensor) -> Normal:
    loc, scale = raw.chunk(2, -1)
    return loc, softplus(scale)


def start() -> Cell:
    """The weights that all contenders start from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Cell()


def data(steps: int, batch: int) -> Tensor:
    """Random chords of four notes or so, shape (T, B, 88)."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(steps, batch, X, generator=generator) < 0.05).float()


def _kl(q: Normal, p: Normal) -> Tensor:
    ratio = (q[1] / p[1]).square()
    return 0.5 * (ratio + ((q[0] - p[0]) / p[1]).square() - 1 - ratio.log()).sum()


Recurrence = Callable[[Cell, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def _one_step(cell: Cell, features_x: Tensor, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loc, scale = cell.encode(features_x, h)
    features_z = cell.features_z(loc + scale * noise)
    return loc, scale, features_z, cell.advance(features_x, features_z, h)


def loss(cell: Cell, x: Tensor, one_step: Recurrence = _one_step) -> Tensor:
    """-ELBO in nats, summed over sequences and steps, from one draw."""
    features_x, noise, h = cell.features_x(x), torch.randn(*x.shape[:2], Z), cell.start(x.shape[1])
    rows = []
    for features, eps in zip(features_x.unbind(), noise.unbind(), strict=True):
        loc, scale, features_z, later = one_step(cell, features, eps, h)
        rows.append((loc, scale, features_z, h))
        h = later
    loc, scale, features_z, hs = (torch.stack(column) for column in zip(*rows, strict=True))
    distortion = binary_cross_entropy_with_logits(cell.decode(features_z, hs), x, reduction="sum")
    return distortion + _kl((loc, scale), cell.prior(hs))


def split_loss(cell: Cell, x: Tensor) -> Tensor:
    """As ``loss``; what x adds to the encoder and to the GRU is computed for all steps at once as well."""
    features_x, noise, h = cell.features_x(x), torch.randn(*x.shape[:2], Z), cell.start(x.shape[1])
    encoder_x, encoder_h = cell.encoder_hidden.weight.split(H, 1)
    gru_x, gru_z = cell.gru.weight_ih.split(H, 1)
    to_encoder = linear(features_x, encoder_x, cell.encoder_hidden.bias)
    to_gru = linear(features_x, gru_x, cell.gru.bias_ih)
    rows = []
    for encoder, gates, eps in zip(to_encoder.unbind(), to_gru.unbind(), noise.unbind(), strict=True):
        raw = cell.encoder_out(torch.addmm(encoder, h, encoder_h.T).relu())
        loc, scale = _normal(raw)
        features_z = cell.features_z(loc + scale * eps)
        rows.append((loc, scale, features_z, h))
        h = _gru(torch.addmm(gates, features_z, gru_z.T), linear(h, cell.gru.weight_hh, cell.gru.bias_hh), h)
    loc, scale, features_z, hs = (torch.stack(column) for column in zip(*rows, strict=True))
    distortion = binary_cross_entropy_with_logits(cell.decode(features_z, hs), x, reduction="sum")
    return distortion + _kl((loc, scale), cell.prior(hs))


def _gru(from_inputs: Tensor, from_h: Tensor, h: Tensor) -> Tensor:
    gates = (from_inputs[:, : 2 * H] + from_h[:, : 2 * H]).sigmoid()
    reset, update = gates.chunk(2, 1)
    new = (from_inputs[:, 2 * H :] + reset * from_h[:, 2 * H :]).tanh()
    return new + update * (h - new)


def _training(objective: Callable[[Cell, Tensor], Tensor], steps: int, batch: int) -> Step:
    cell, x = start(), data(steps, batch)
    optim = torch.optim.Adam(cell.parameters(), lr=LR, fused=True)

    def step() -> float:
        optim.zero_grad()
        value = objective(cell, x)
        value.backward()
        optim.step()
        return value.item()

    return step


def make_eager(steps: int, batch: int) -> Step:
    return _training(loss, steps, batch)


def make_split(steps: int, batch: int) -> Step:
    return _training(split_loss, steps, batch)


def make_compiled(steps: int, batch: int) -> Step:
    """One step compiled, forward and backward; Python loops over it."""
    compiled = torch.compile(_one_step, fullgraph=True, dynamic=False)
    return _training(lambda cell, x: loss(cell, x, compiled), steps, batch)
