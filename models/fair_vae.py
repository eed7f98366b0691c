"""A variational autoencoder of mixed columns whose decoder sees the sensitive attribute.

    s_n ~ Categorical(π),   z_n ~ Normal(0, I)
    x_n | z_n, s_n:  numeric columns ~ Normal(decoder(z_n, s_n), σ²),  each group of categories ~ Categorical(decoder)
    y_n | z_n ~ Bernoulli(logit = head(z_n))
    q(z_n | x_n, s_n) = Normal(mean(x_n, s_n), diag(scale(x_n, s_n)²))

Since the decoder knows s, z need not carry it: with a penalty on I(z; s), z keeps of x what s does not say. The head is
not told s, so that a prediction of y is made of z alone. Without hidden layers both networks are linear and all rows
share one scale, as the exact posterior of the linear-Gaussian model does, which this is for numeric columns: where x
given s is Gaussian, so is q(z | s).
Louizos, Swersky, Li, Welling, Zemel (2016), The variational fair autoencoder, arXiv:1511.00830; Moyer, Gao, Brekelmans,
Galstyan, Ver Steeg (2018), arXiv:1805.09458.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

Latents = Float[Tensor, "*particles n z_dim"]


class FairVAE(nn.Module):
    """Model and guide: ``model(x, s, y)`` and ``guide(x, s, y)``; without y the target's site is left out.

    Observed sites are ``s``, ``x_numeric``, one ``x_<group>`` a group, and ``y``; the latent is ``z``.

    Args:
        numeric: how many of the first columns are numbers; give them standardized.
        groups: name and number of levels of each categorical column, which follows as so many columns of zeros and a
            one, in this order.
        s_levels: levels of s, whole numbers from 0.
        z_dim: latent dimensions.
        hidden: widths of the encoder's hidden layers, and in reverse of the decoder's; without any both are linear.
        target: whether y is predicted from z, by a linear head.
        target_weight: by what the log-likelihood of y is multiplied: at 1 it is a few tenths of a nat beside the many
            nats of x. Any other makes the objective no bound on log p(x, y | s).
        size: rows of the full data, of which x, s and y are minibatches; those given if omitted.
    """

    def __init__(
        self,
        numeric: int,
        groups: Mapping[str, int],
        *,
        s_levels: int = 2,
        z_dim: int = 8,
        hidden: Sequence[int] = (100,),
        target: bool = True,
        target_weight: float = 1.0,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.numeric, self.groups, self.s_levels, self.z_dim = numeric, dict(groups), s_levels, z_dim
        self.target_weight, self.size = target_weight, size
        columns = numeric + sum(self.groups.values())
        self.encoder = layers(columns + s_levels, *hidden, 2 * z_dim if hidden else z_dim)
        self.decoder = layers(z_dim + s_levels, *reversed(hidden), columns)
        self.head = nn.Linear(z_dim, 1) if target else None
        self.shared_scale = None if hidden else nn.Parameter(torch.zeros(z_dim))
        self.raw_scale = nn.Parameter(torch.zeros(numeric))
        self.s_logits = nn.Parameter(torch.zeros(s_levels))

    def model(
        self, x: Float[Tensor, "n columns"], s: Int[Tensor, " n"], y: Float[Tensor, " n"] | None = None
    ) -> Latents:
        with self._data(len(x)):
            pyro.sample("s", dist.Categorical(logits=self.s_logits), obs=s)
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            self._observe(self.decode(z, s), x)
            if self.head is not None and y is not None:
                with pyro.poutine.scale(scale=self.target_weight):
                    pyro.sample("y", dist.Bernoulli(logits=self.head(z).squeeze(-1)), obs=y)
        return z

    def guide(
        self, x: Float[Tensor, "n columns"], s: Int[Tensor, " n"], y: Float[Tensor, " n"] | None = None
    ) -> Latents:
        with self._data(len(x)):
            return pyro.sample("z", dist.Normal(*self.encode(x, s)).to_event(1))

    def encode(
        self, x: Float[Tensor, "n columns"], s: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n z_dim"], Float[Tensor, "n z_dim"]]:
        """Mean and standard deviation of q(z | x, s)."""
        loc = self.encoder(torch.cat([x, self._told(s, x)], -1))
        loc, raw = (loc, self.shared_scale.expand_as(loc)) if self.shared_scale is not None else loc.chunk(2, -1)
        return loc, softplus(raw) + 1e-4

    def decode(self, z: Latents, s: Int[Tensor, " n"]) -> Float[Tensor, "*particles n columns"]:
        """Means of the numeric columns and logits of the others."""
        return self.decoder(torch.cat([z, self._told(s, z).expand(*z.shape[:-1], -1)], -1))

    @property
    def numeric_scale(self) -> Float[Tensor, " numeric"]:
        """σ of the numeric columns; at least a hundredth of their spread: a constant column does not take all."""
        return softplus(self.raw_scale) + 1e-2

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n columns"], s: Int[Tensor, " n"], seed: int = 0) -> Float[Tensor, "n z_dim"]:
        """One draw of q(z | x, s) a row. I(z; s) is defined by these; means or several draws may tell more."""
        loc, scale = self.encode(x, s)
        return loc + scale * torch.randn(loc.shape, generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)

    def _data(self, rows: int) -> pyro.plate:
        pyro.module("fairvae", self)
        size = rows if self.size is None else self.size
        return pyro.plate("data", size, subsample=None if size == rows else torch.arange(rows))

    def _told(self, s: Int[Tensor, " n"], like: Tensor) -> Float[Tensor, "n s_levels"]:
        return one_hot(s, self.s_levels).to(like)

    def _observe(self, decoded: Float[Tensor, "*particles n columns"], x: Float[Tensor, "n columns"]) -> None:
        sizes = [self.numeric, *self.groups.values()]
        (loc, *logits), (numbers, *levels) = decoded.split(sizes, -1), x.split(sizes, -1)
        if self.numeric:
            pyro.sample("x_numeric", dist.Normal(loc, self.numeric_scale).to_event(1), obs=numbers)
        for name, logit, level in zip(self.groups, logits, levels, strict=True):
            pyro.sample(f"x_{name}", dist.OneHotCategorical(logits=logit), obs=level)


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with Softplus in between."""
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        parts += [nn.Linear(inputs, outputs), nn.Softplus()]
    return nn.Sequential(*parts[:-1])


class Table(NamedTuple):
    """Rows of mixed columns with a sensitive attribute and a target.

    Attributes:
        x: numeric columns first, standardized, then the groups of categories as zeros and a one.
        s: the sensitive attribute, levels from 0.
        y: the target, 0 or 1.
    """

    x: Float[Tensor, "n columns"]
    s: Int[Tensor, " n"]
    y: Float[Tensor, " n"]

    def rows(self, chosen: Int[Tensor, " m"]) -> "Table":
        """Return some of the rows."""
        return Table(*(column[chosen] for column in self))


def load_adult(path: str | PathLike) -> tuple[Table, Table, dict[str, int]]:
    """UCI's Adult: train and test split, and the groups of categories; s is 1 for men, y for more than 50 000 $.

    Both columns of sex are left out of x. Amounts of money and census weights enter as log(1 + amount); means and
    standard deviations are those of the train split.
    """
    with np.load(path, allow_pickle=False) as data:
        skewed = np.isin(data["num_names"], ["capital-gain", "capital-loss", "fnlwgt"])
        kinds = np.array([name.split("=")[0] for name in data["cat_names"]])
        numbers = {}
        for split in ("train", "test"):
            raw = data[f"x_num_{split}"].astype(np.float64)
            numbers[split] = np.where(skewed, np.log1p(raw), raw)
        mean, spread = numbers["train"].mean(0), numbers["train"].std(0)

        def table(split: str) -> Table:
            x = np.concatenate([(numbers[split] - mean) / spread, data[f"x_cat_{split}"][:, kinds != "sex"]], 1)
            s, y = data[f"sex_male_{split}"].astype(np.int64), data[f"y_{split}"].astype(np.float32)
            return Table(torch.tensor(x, dtype=torch.float32), torch.tensor(s), torch.tensor(y))

        groups = {str(kind): int((kinds == kind).sum()) for kind in dict.fromkeys(kinds) if kind != "sex"}
        return table("train"), table("test"), groups
