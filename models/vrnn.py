"""The variational recurrent network, and its Markov form.

    h_t = GRU(φ_x(x_t), φ_z(z_t), h_{t-1})
    z_t ~ Normal(prior(h_{t-1})),   x_t ~ Bernoulli(decoder(φ_z(z_t), h_{t-1}))
    q(z_t | x_t, h_{t-1}) = Normal(encoder(φ_x(x_t), h_{t-1}))

Model and guide run the same recurrence. In the Markov form nothing but z is carried on:

    z_t ~ Normal(prior(z_{t-1})),   x_t ~ Bernoulli(decoder(z_t))
    q(z_t | z_{t-1}, x_{1:T}) = Normal(encoder(z_{t-1}, s_t)),   s_t = GRU(x_t, s_{t+1})

Given z_{t-1}, earlier frames say nothing of z_t: the summary s_t of x_{t:T} stands for all of x.
Chung et al. (2015), A recurrent latent variable model for sequential data, arXiv:1506.02216.
"""

import pyro
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.cells import GRU, MLP, SequenceModel, bernoulli, gaussian, summaries


class VRNN(SequenceModel):
    """The variational recurrent network of Chung et al.; its guide filters.

    Args:
        x_dim: features of a frame.
        z_dim: latent dimensions of a frame.
        hidden: width of the recurrence and of all hidden layers.
    """

    def __init__(self, x_dim: int = 88, z_dim: int = 16, hidden: int = 64) -> None:
        super().__init__(x_dim, z_dim)
        self.features_x = MLP(x_dim, hidden, hidden)
        self.features_z = MLP(z_dim, hidden, hidden)
        self.prior = MLP(hidden, hidden, 2 * z_dim)
        self.decoder = MLP((hidden, hidden), hidden, x_dim)
        self.encoder = MLP((hidden, hidden), hidden, 2 * z_dim)
        self.cell = GRU((hidden, hidden), hidden)

    @property
    def output(self) -> nn.Linear:
        return self.decoder.last

    def model(
        self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None, horizon: int = 0
    ) -> Float[Tensor, "*particles n all_time x_dim"]:
        return self.scan(self.model_step, self.cell.start(x), x, lengths, horizon)

    def guide(self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None) -> None:
        self.scan(self.guide_step, self.cell.start(x), x, lengths)

    def model_step(self, h: Tensor, x_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw z_t, and x_t unless it is given."""
        z = pyro.sample("z", gaussian(*self.prior(h).chunk(2, -1)))
        features_z = self.features_z(z)
        x = pyro.sample("x", bernoulli(self.decoder(features_z, h)), obs=x_t)
        return self.advance(h, self.features_x(x), features_z), x

    def guide_step(self, h: Tensor, x_t: Tensor) -> tuple[Tensor, None]:
        """Draw z_t given the frames up to x_t."""
        features_x = self.features_x(x_t)
        z = pyro.sample("z", gaussian(*self.encoder(features_x, h).chunk(2, -1)))
        return self.advance(h, features_x, self.features_z(z)), None

    def advance(self, h: Tensor, features_x: Tensor, features_z: Tensor) -> Tensor:
        """The next state: the same operations in model and guide, so that they can be done once for both."""
        return self.cell(h, features_x, features_z)


class MarkovVRNN(SequenceModel):
    """The form in which z alone carries the past; its guide smooths, or filters.

    Args:
        x_dim: features of a frame.
        z_dim: latent dimensions of a frame.
        hidden: width of the encoder's recurrence and of all hidden layers.
        smooth: whether the encoder runs backward, q(z_t | z_{t-1}, x_{1:T}), or forward, q(z_t | z_{t-1}, x_{1:t}).
    """

    def __init__(self, x_dim: int = 88, z_dim: int = 16, hidden: int = 64, *, smooth: bool = True) -> None:
        super().__init__(x_dim, z_dim)
        self.smooth = smooth
        self.prior = MLP(z_dim, hidden, 2 * z_dim)
        self.decoder = MLP(z_dim, hidden, x_dim)
        self.encoder = MLP((z_dim, hidden), hidden, 2 * z_dim)
        self.cell = GRU(x_dim, hidden)

    @property
    def output(self) -> nn.Linear:
        return self.decoder.last

    def model(
        self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None, horizon: int = 0
    ) -> Float[Tensor, "*particles n all_time x_dim"]:
        return self.scan(self.model_step, self._start(x), x, lengths, horizon)

    def guide(self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None) -> None:
        seen = summaries(self.cell, x, lengths, reverse=self.smooth)
        self.scan(self.guide_step, self._start(x), seen, lengths)

    def model_step(self, z: Tensor, x_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw z_t given z_{t-1}, and x_t unless it is given."""
        z = pyro.sample("z", gaussian(*self.prior(z).chunk(2, -1)))
        return z, pyro.sample("x", bernoulli(self.decoder(z)), obs=x_t)

    def guide_step(self, z: Tensor, seen: Tensor) -> tuple[Tensor, None]:
        """Draw z_t given z_{t-1} and what the encoder has seen."""
        return pyro.sample("z", gaussian(*self.encoder(z, seen).chunk(2, -1))), None

    def _start(self, x: Tensor) -> Tensor:
        return self.cell.state.weight.new_zeros(len(x), self.z_dim)
