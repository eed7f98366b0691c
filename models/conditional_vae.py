"""A variational autoencoder of images whose class is told to the prior, the decoder and the encoder.

    c_n ~ Categorical(π),    z_n | c_n ~ Normal(m[c_n], diag(s[c_n]²))
    x_n | z_n, c_n ~ Binomial(total, logits = decoder(z_n, c_n))
    q(z_n | x_n, c_n) = Normal(mean(x_n, c_n), diag(scale(x_n, c_n)²))

The class says which digit, and z how it is written. Its prior differs by class, so a style is how far z lies from the
prior's mean in the prior's standard deviations: (z - m[c]) / s[c]. The ELBO of (x, c) bounds log p(x, c). Offered every
class in turn it ranks labels without a classifier. It is tight only where the encoder was trained: a wrong label costs
likelihood, KL and tightness together.
Sohn, Lee, Yan (2015), Learning structured output representation using deep conditional generative models, NeurIPS;
Kingma, Rezende, Mohamed, Welling (2014), arXiv:1406.5298.
"""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

import pyro_elbo as pe
from models.fair_vae import layers

Latents = Float[Tensor, "*particles n z_dim"]


class ConditionalVAE(nn.Module):
    """Model and guide: ``model(x, c)`` and ``guide(x, c)``, with observed sites ``c`` and ``x`` and the latent ``z``.

    Args:
        x_dim: columns of x, counts from 0 to ``total``.
        classes: levels of c, whole numbers from 0.
        z_dim: latent dimensions.
        hidden: width of the hidden layer of encoder and decoder.
        total: largest count of a column.
    """

    def __init__(
        self, x_dim: int = 64, classes: int = 10, *, z_dim: int = 4, hidden: int = 128, total: int = 16
    ) -> None:
        super().__init__()
        self.classes, self.total = classes, total
        self.encoder = layers(x_dim + classes, hidden, 2 * z_dim)
        self.decoder = layers(z_dim + classes, hidden, x_dim)
        self.prior_loc = nn.Parameter(torch.zeros(classes, z_dim))
        self.raw_prior_scale = nn.Parameter(torch.full((classes, z_dim), 0.54))  # softplus(0.54) = 1
        self.class_logits = nn.Parameter(torch.zeros(classes))

    def model(self, x: Float[Tensor, "n x_dim"], c: Int[Tensor, " n"]) -> Latents:
        pyro.module("conditional_vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.class_logits), obs=c)
            z = pyro.sample("z", dist.Normal(*self.prior(c)).to_event(1))
            pyro.sample("x", dist.Binomial(self.total, logits=self.decode(z, c)).to_event(1), obs=x)
        return z

    def guide(self, x: Float[Tensor, "n x_dim"], c: Int[Tensor, " n"]) -> Latents:
        pyro.module("conditional_vae", self)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(*self.encode(x, c)).to_event(1))

    def prior(self, c: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n z_dim"], Float[Tensor, "n z_dim"]]:
        """Mean and standard deviation of p(z | c)."""
        return self.prior_loc[c], softplus(self.raw_prior_scale[c]) + 1e-2

    def encode(
        self, x: Float[Tensor, "n x_dim"], c: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n z_dim"], Float[Tensor, "n z_dim"]]:
        """Mean and standard deviation of q(z | x, c)."""
        loc, raw = self.encoder(torch.cat([x / self.total, self._told(c, x)], -1)).chunk(2, -1)
        return loc, softplus(raw) + 1e-4

    def decode(self, z: Latents, c: Int[Tensor, " n"]) -> Float[Tensor, "*particles n x_dim"]:
        """Logits of the columns."""
        return self.decoder(torch.cat([z, self._told(c, z).expand(*z.shape[:-1], -1)], -1))

    @torch.no_grad()
    def restyle(self, x: Float[Tensor, "n x_dim"], c: Int[Tensor, " n"], to: Int[Tensor, " n"]) -> Tensor:
        """Return the mean image of class ``to`` in the style of x, which is of class c: counts, shape (n, x_dim)."""
        (loc, scale), (other_loc, other_scale) = self.prior(c), self.prior(to)
        style = (self.encode(x, c)[0] - loc) / scale
        return self.total * self.decode(other_loc + other_scale * style, to).sigmoid()

    @torch.no_grad()
    def elbo_per_label(self, x: Float[Tensor, "n x_dim"], num_particles: int = 4) -> Float[Tensor, "n classes"]:
        """Return the ELBO of every image under every label: lower bounds on log p(x, c) in nats."""
        loss = pe.TraceBeta_ELBO(num_particles=num_particles, vectorize_particles=True)
        bounds = []
        for c in range(self.classes):
            terms = loss.terms(self.model, self.guide, x, torch.full((len(x),), c))
            bounds.append(sum(terms.log_likelihood.values()) - terms.kl["z"])
        return torch.stack(bounds, -1)

    def _told(self, c: Int[Tensor, " n"], like: Tensor) -> Float[Tensor, "n classes"]:
        return one_hot(c, self.classes).to(like)
