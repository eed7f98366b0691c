"""A semi-supervised variational autoencoder of images, of which few have a label (M2).

    y_n ~ Categorical(1/K),    z_n ~ Normal(0, I),    x_n | y_n, z_n ~ Binomial(total, logits = decoder(z_n, y_n))
    q(y_n | x_n) = Categorical(classifier(x_n)),    q(z_n | x_n, y_n) = Normal(mean(x_n, y_n), diag(scale(x_n, y_n)²))

The class says which digit, and z how it is written. Where a label is known, q(y) is a point on it; elsewhere the bound
is averaged over q(y | x) exactly, one class beside the other. Only rows without a label train the classifier through
the bound. Rows with one do so through the site ``label``: log q(label | x), weighted by α beside the bound.
Kingma, Rezende, Mohamed, Welling (2014), Semi-supervised learning with deep generative models, arXiv:1406.5298.
"""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from models.fair_vae import layers

UNKNOWN = -1
"""The label of a row that has none."""


class SSVAE(nn.Module):
    """Model and guide: ``model(x, label)`` and ``guide(x, label)``, with the latents ``y`` and ``z``.

    Observed sites are ``x`` and, in rows with a label, ``label``. Without the argument ``label`` no row has one, and
    ``terms.posterior["y"]`` is q(y | x).

    Args:
        x_dim: columns of x, counts from 0 to ``total``.
        classes: levels of y, whole numbers from 0.
        z_dim: latent dimensions.
        hidden: width of the hidden layer of each network.
        total: largest count of a column.
        alpha: the weight of log q(label | x). At 0 there is no such site: the objective is a bound on log p(x, label),
            and leaves the classifier to the rows without a label.
        size: rows of the full data, of which x and label are minibatches; those given if omitted.
    """

    def __init__(
        self,
        x_dim: int = 64,
        classes: int = 10,
        *,
        z_dim: int = 4,
        hidden: int = 128,
        total: int = 16,
        alpha: float = 10.0,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.z_dim, self.total, self.alpha, self.size = classes, z_dim, total, alpha, size
        self.classifier = layers(x_dim, hidden, classes)
        self.encoder = layers(x_dim + classes, hidden, 2 * z_dim)
        self.decoder = layers(z_dim + classes, hidden, x_dim)

    def model(self, x: Float[Tensor, "n x_dim"], label: Int[Tensor, " n"] | None = None) -> None:
        with self._data(len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(self.classes)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(self.total, logits=self.decode(z, y)).to_event(1), obs=x)
            if label is not None and self.alpha > 0:
                with pyro.poutine.mask(mask=label != UNKNOWN), pyro.poutine.scale(scale=self.alpha):
                    pyro.sample("label", dist.Categorical(logits=self.classify(x)), obs=label.clamp(min=0))

    def guide(self, x: Float[Tensor, "n x_dim"], label: Int[Tensor, " n"] | None = None) -> None:
        with self._data(len(x)):
            logits = self.classify(x)
            if label is not None:
                logits = torch.where((label == UNKNOWN)[:, None], logits, self._told(label.clamp(min=0), x).log())
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(*self.encode(x, y)).to_event(1))

    def classify(self, x: Float[Tensor, "n x_dim"]) -> Float[Tensor, "n classes"]:
        """Logits of q(y | x)."""
        return self.classifier(x / self.total)

    def encode(self, x: Float[Tensor, "n x_dim"], y: Int[Tensor, "*classes n"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x, y), shapes (*classes, n, z_dim)."""
        told = self._told(y, x).expand(*y.shape[:-1], len(x), -1)
        loc, raw = self.encoder(torch.cat([(x / self.total).expand(*told.shape[:-1], -1), told], -1)).chunk(2, -1)
        return loc, softplus(raw) + 1e-4

    def decode(
        self, z: Float[Tensor, "*classes n z_dim"], y: Int[Tensor, "*classes n"]
    ) -> Float[Tensor, "*classes n x_dim"]:
        """Logits of the columns."""
        told = self._told(y, z)
        shape = torch.broadcast_shapes(z.shape[:-1], told.shape[:-1])
        return self.decoder(torch.cat([z.expand(*shape, -1), told.expand(*shape, -1)], -1))

    def _data(self, rows: int) -> pyro.plate:
        pyro.module("ss_vae", self)
        size = rows if self.size is None else self.size
        return pyro.plate("data", size, subsample=None if size == rows else torch.arange(rows))

    def _told(self, y: Int[Tensor, "*n"], like: Tensor) -> Float[Tensor, "*n classes"]:
        return one_hot(y, self.classes).to(like)
