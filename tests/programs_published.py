"""Programs that the field publishes, written from their mathematics at small size: what people bring to the library.

Each ``make`` returns a fresh model and guide; ``data()`` returns the arguments of both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from pyro.infer import autoguide, reparam
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_elbo as pe

Programs = tuple[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class Published:
    """One pair.

    Attributes:
        mean_field: whether Pyro's TraceMeanField_ELBO is valid for the pair too.
        refused: the line that no compiled step can hold, if there is one.
    """

    name: str
    make: Callable[[], Programs]
    data: Callable[[], tuple] = tuple
    mean_field: bool = False
    refused: str = ""


PUBLISHED: list[Published] = []


def published(name: str, data: Callable[[], tuple] = tuple, **options: Any) -> Callable[[Any], Any]:
    """Add a pair to the table."""

    def add(make: Callable[[], Programs]) -> Callable[[], Programs]:
        PUBLISHED.append(Published(name, make, data, **options))
        return make

    return add


def fixed(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Softplus()]
    return nn.Sequential(*layers[:-1])


def positive(name: str, *shape: int, value: float = 0.5) -> torch.Tensor:
    return pyro.param(name, lambda: torch.full(shape, value), constraint=constraints.positive)


def real(name: str, *shape: int, value: float = 0.1) -> torch.Tensor:
    return pyro.param(name, lambda: torch.full(shape, value))


# --- autoencoders --------------------------------------------------------------------------------------------------


def pixels() -> tuple:
    """Grey values between 0 and 1."""
    return (fixed(5, 6).sigmoid(),)


@published("VAE, grey pixels", pixels, mean_field=True)
def vae() -> Programs:
    encoder, decoder = net(6, 4, 4), net(2, 4, 6)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            probs = decoder(z).sigmoid()
            pyro.sample("x", dist.Bernoulli(probs, validate_args=False).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide


class SemiSupervised(nn.Module):
    """x from a digit y and a style z; y is given or guessed. The plate has no size."""

    def __init__(self) -> None:
        super().__init__()
        self.classify, self.encode, self.decode = net(6, 4, 3), net(9, 4, 4), net(5, 4, 6)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), 2), xs.new_ones(len(xs), 2)).to_event(1))
            prior = xs.new_ones(len(xs), 3) / 3.0
            ys = pyro.sample("y", dist.OneHotCategorical(prior), obs=ys)
            logits = self.decode(torch.cat([zs, ys], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.classify(xs)))
            loc, raw = self.encode(torch.cat([xs, ys], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@published("SS-VAE, unsupervised", pixels)
def semi_supervised() -> Programs:
    module = SemiSupervised()
    return module.model, module.guide


@published("SS-VAE, supervised", lambda: (*pixels(), torch.eye(3)[torch.tensor([0, 1, 2, 1, 0])]), mean_field=True)
def supervised() -> Programs:
    return semi_supervised()


@published("CVAE", lambda: (fixed(5, 3), fixed(5, 4, seed=1).sigmoid().round()))
def conditional_vae() -> Programs:
    """The rest of a picture from a part of it: prior, recognition and generation networks."""
    prior, recognition, generation = net(3, 4, 4), net(7, 4, 4), net(5, 4, 4)

    def model(xs, ys):
        pyro.module("generation", nn.ModuleList([prior, generation]))
        with pyro.plate("data"):
            loc, raw = prior(xs).chunk(2, -1)
            zs = pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))
            logits = generation(torch.cat([zs, xs], -1))
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=ys)

    def guide(xs, ys):
        pyro.module("recognition", recognition)
        with pyro.plate("data"):
            loc, raw = recognition(torch.cat([xs, ys], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide


@published("flow prior", lambda: (fixed(5, 4),))
def flow_prior() -> Programs:
    """A VAE whose prior is a normalizing flow."""
    flow = T.affine_coupling(2, [4])
    encoder, decoder = net(4, 4, 4), net(2, 4, 4)

    def model(x):
        pyro.module("decoder", nn.ModuleList([decoder, flow]))
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide


# --- sequences and pictures ----------------------------------------------------------------------------------------


@published("DMM, annealed", lambda: (fixed(3, 4, 2).sigmoid().round(), torch.tensor([4, 2, 3]), torch.tensor(0.4)))
def deep_markov_model() -> Programs:
    """z_t from z_{t-1}, x_t from z_t; ragged lengths by mask, the latents' terms scaled by an annealing factor."""
    transition, emission, combiner = net(2, 4, 4), net(2, 4, 2), net(4, 4, 4)

    def model(x, lengths, annealing):
        pyro.module("dmm", nn.ModuleList([transition, emission]))
        z = torch.zeros(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    loc, raw = transition(z).chunk(2, -1)
                    with poutine.scale(scale=annealing):
                        z = pyro.sample(f"z_{t}", dist.Normal(loc, raw.exp()).to_event(1))
                    pyro.sample(f"x_{t}", dist.Bernoulli(logits=emission(z)).to_event(1), obs=x[:, t])

    def guide(x, lengths, annealing):
        pyro.module("combiner", combiner)
        z = torch.zeros(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths), poutine.scale(scale=annealing):
                    loc, raw = combiner(torch.cat([z, x[:, t]], -1)).chunk(2, -1)
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide


@published("AIR", lambda: (fixed(3, 6),))
def attend_infer_repeat() -> Programs:
    """Up to two objects: present or not, where and what; what is absent is masked."""
    encoder, decoder = net(12, 6, 9), net(4, 6, 6)

    def steps(x, infer):
        canvas, present = torch.zeros_like(x), x.new_ones(len(x))
        for t in range(2):
            presence, where, what = infer(canvas)
            present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(presence * present))
            with poutine.mask(mask=present.bool()):
                z_where = pyro.sample(f"z_where_{t}", where)
                z_what = pyro.sample(f"z_what_{t}", what)
            canvas = canvas + present.unsqueeze(-1) * decoder(torch.cat([z_where, z_what], -1))
        return canvas

    def prior(canvas):
        zeros = canvas.new_zeros(len(canvas), 2)
        return (
            canvas.new_full((len(canvas),), 0.5),
            dist.Normal(zeros, 1.0).to_event(1),
            dist.Normal(zeros, 1).to_event(1),
        )

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            canvas = steps(x, prior)
            pyro.sample("x", dist.Normal(canvas, 0.3).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)

        def infer(canvas):
            h = encoder(torch.cat([x, canvas], -1))
            a, b, c, d = h[:, 1:].chunk(4, -1)
            where, what = dist.Normal(a, b.exp()).to_event(1), dist.Normal(c, d.exp()).to_event(1)
            return h[:, 0].sigmoid(), where, what

        with pyro.plate("data", len(x)):
            steps(x, infer)

    return model, guide


@published("stochastic volatility", lambda: (0.3 * fixed(8),))
def stochastic_volatility() -> Programs:
    """Returns whose log variance is a random walk, written with its increments."""

    def model(returns):
        sigma = pyro.sample("sigma", dist.Exponential(50.0 * torch.ones(())))
        nu = pyro.sample("nu", dist.Exponential(0.1 * torch.ones(())))
        with pyro.plate("time", len(returns)):
            steps = pyro.sample("steps", dist.Normal(0.0, 1.0))
        volatility = pyro.deterministic("volatility", (sigma * steps.cumsum(-1)).exp())
        with pyro.plate("days", len(returns)):
            pyro.sample("returns", dist.StudentT(nu + 2, 0.0, volatility), obs=returns)

    return model, autoguide.AutoNormal(model)


@published("local level, by scan", lambda: (fixed(6),), mean_field=True)
def local_level() -> Programs:
    def model(x):
        sd = positive("sd", value=0.7)

        def step(level, x_t):
            level = pyro.sample("level", dist.Normal(level, sd))
            pyro.sample("x", dist.Normal(level, 0.5), obs=x_t)
            return level, None

        pe.scan(step, torch.zeros(()), x)

    def guide(x):
        gain, width = real("gain", 2, value=0.4), positive("width")

        def step(level, x_t):
            level = pyro.sample("level", dist.Normal(gain[0] * level + gain[1] * x_t, width))
            return level, None

        pe.scan(step, torch.zeros(()), x)

    return model, guide


# --- text, counts, matrices ----------------------------------------------------------------------------------------


@published("sparse gamma DEF", lambda: (fixed(4, 5).abs().mul(3).round(),))
def sparse_gamma_def() -> Programs:
    """Two layers of gamma latents by row, global weights, Poisson counts."""
    shapes = {"w_top": (2, 3), "w_bottom": (3, 5)}

    def weights(density):
        found = {}
        for name, (rows, columns) in shapes.items():
            with pyro.plate(f"{name}_plate", rows * columns):
                found[name] = pyro.sample(name, density(name, rows * columns)).reshape(rows, columns)
        return found

    def model(x):
        w = weights(lambda name, n: dist.Gamma(0.3 * torch.ones(n), 0.3))
        with pyro.plate("data", len(x)):
            top = pyro.sample("z_top", dist.Gamma(0.5 * torch.ones(2), 0.5).to_event(1))
            bottom = pyro.sample("z_bottom", dist.Gamma(0.5, 0.5 / (top @ w["w_top"] + 0.1)).to_event(1))
            pyro.sample("x", dist.Poisson(bottom @ w["w_bottom"] + 0.1).to_event(1), obs=x)

    def guide(x):
        def density(name, *shape):
            alpha = positive(f"{name}_alpha", *shape)
            return dist.Gamma(alpha, alpha / positive(f"{name}_mean", *shape, value=1.0))

        weights(density)
        with pyro.plate("data", len(x)):
            pyro.sample("z_top", density("z_top", len(x), 2).to_event(1))
            pyro.sample("z_bottom", density("z_bottom", len(x), 3).to_event(1))

    return model, guide


@published(
    "ProdLDA",
    lambda: (torch.tensor([[2.0, 0, 1, 3], [1, 1, 0, 0], [0, 4, 2, 1]]),),
    mean_field=True,
    refused="int(docs.sum(-1).max())",
)
def product_lda() -> Programs:
    """Topics by a logistic normal; documents of different lengths, so that the multinomial is not validated."""
    encoder, decoder = net(4, 5, 6), nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))

    def model(docs):
        pyro.module("decoder", decoder)
        with pyro.plate("documents", len(docs)):
            logits = pyro.sample("theta", dist.Normal(docs.new_zeros(len(docs), 3), 1.0).to_event(1))
            words = decoder(logits.softmax(-1)).softmax(-1)
            total = int(docs.sum(-1).max())
            pyro.sample("words", dist.Multinomial(total, words, validate_args=False), obs=docs)

    def guide(docs):
        pyro.module("encoder", encoder)
        with pyro.plate("documents", len(docs)):
            loc, raw = encoder(docs).chunk(2, -1)
            pyro.sample("theta", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))

    return model, guide


@published("matrix factorization", lambda: (fixed(3, 4),))
def matrix_factorization() -> Programs:
    """Plates that cross; users and movies are drawn in one plate each."""

    def model(ratings):
        users, movies = pyro.plate("users", 3, dim=-2), pyro.plate("movies", 4, dim=-1)
        with users:
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with movies:
            v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with users, movies:
            pyro.sample("rating", dist.Normal((u * v).sum(-1), 0.5), obs=ratings)

    return model, autoguide.AutoNormal(model)


@published("item response", lambda: (fixed(4, 3).sign().clamp(min=0),))
def item_response() -> Programs:
    """Two-parameter logistic: ability, difficulty, discrimination."""

    def model(answers):
        persons, items = pyro.plate("persons", 4, dim=-2), pyro.plate("items", 3, dim=-1)
        with persons:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
            discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
        with persons, items:
            logits = discrimination * (ability - difficulty)
            pyro.sample("answer", dist.Bernoulli(logits=logits), obs=answers)

    return model, autoguide.AutoNormal(model)


# --- regression ----------------------------------------------------------------------------------------------------


def regression_data() -> tuple:
    x = fixed(6, 2)
    return x, x @ torch.tensor([0.8, -0.4]) + 0.3 * fixed(6, seed=1)


class Regression(PyroModule):
    """Weights with priors, as PyroSample writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


@published("Bayesian regression, PyroSample", regression_data)
def regression() -> Programs:
    model = Regression()
    return model, autoguide.AutoDiagonalNormal(model)


class BayesianNetwork(PyroModule):
    """One hidden layer, a prior on every weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PyroModule[nn.Linear](2, 3), PyroModule[nn.Linear](3, 1)
        for layer in (self.first, self.second):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))

    def forward(self, x, y=None):
        mean = self.second(self.first(x).tanh()).squeeze(-1)
        sigma = pyro.sample("sigma", dist.Gamma(0.5, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma * sigma), obs=y)


@published("Bayesian neural network", regression_data)
def bayesian_network() -> Programs:
    model = BayesianNetwork()
    return model, autoguide.AutoNormal(model)


@published("robust regression", regression_data)
def robust_regression() -> Programs:
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.StudentT(nu, x @ w, sigma), obs=y)

    return model, autoguide.AutoMultivariateNormal(model)


@published("Poisson regression, horseshoe", lambda: (fixed(6, 3), torch.tensor([0.0, 2, 1, 0, 3, 1])))
def horseshoe() -> Programs:
    def model(x, counts):
        tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(())))
        with pyro.plate("features", 3):
            lam = pyro.sample("lambda", dist.HalfCauchy(1.0))
            w = pyro.sample("w", dist.Normal(0.0, lam * tau))
        with pyro.plate("data", len(x)):
            pyro.sample("counts", dist.Poisson((x @ w).clamp(max=5).exp()), obs=counts)

    return model, autoguide.AutoNormal(model, init_scale=0.1)


@published("hierarchical logistic", lambda: (fixed(8), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]), fixed(8, seed=2) > 0))
def hierarchical_logistic() -> Programs:
    """Intercepts by group; the guide draws them in another order than the model."""

    def model(x, group, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        sd = pyro.sample("sd", dist.HalfCauchy(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3):
            intercept = pyro.sample("intercept", dist.Normal(mu, sd))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=intercept[..., group] + slope * x), obs=y.to(x))

    def guide(x, group, y):
        with pyro.plate("groups", 3):
            pyro.sample("intercept", dist.Normal(real("i_loc", 3), positive("i_sd", 3)))
        pyro.sample("slope", dist.Normal(real("s_loc"), positive("s_sd")))
        pyro.sample("sd", dist.LogNormal(real("sd_loc"), positive("sd_sd")))
        pyro.sample("mu", dist.Normal(real("mu_loc"), positive("mu_sd")))

    return model, guide


@published("logistic growth", lambda: (torch.linspace(0.0, 5.0, 7), torch.tensor([0.1, 0.3, 0.8, 1.6, 2.3, 2.7, 2.9])))
def logistic_growth() -> Programs:
    def model(t, size):
        capacity = pyro.sample("capacity", dist.LogNormal(1.0, 0.5))
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
        start = pyro.sample("start", dist.Beta(1.0, 9.0)) * capacity
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        growth = start * (rate * t).exp()
        mean = pyro.deterministic("mean", capacity * growth / (capacity + growth - start))
        with pyro.plate("data", len(t)):
            pyro.sample("size", dist.LogNormal(mean.log(), sigma), obs=size)

    return model, autoguide.AutoLowRankMultivariateNormal(model, rank=2)


@published("survival, censored", lambda: (fixed(6), fixed(6, seed=3).exp(), torch.tensor([1, 0, 1, 1, 0, 1]).bool()))
def survival() -> Programs:
    """Weibull times; of a censored one the survival function counts."""

    def model(x, time, seen):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        shape = pyro.sample("shape", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            scale = (slope * x).exp()
            with poutine.mask(mask=seen):
                pyro.sample("time", dist.Weibull(scale, shape), obs=time)
            with poutine.mask(mask=~seen):
                pyro.factor("censored", -((time / scale) ** shape))

    return model, autoguide.AutoNormal(model)


@published("sparse GP", lambda: ())
def sparse_gaussian_process() -> Programs:
    """Variational inducing points, as pyro.contrib.gp writes them."""
    x = torch.linspace(-2.0, 2.0, 8)
    kernel = gp.kernels.RBF(1, variance=torch.tensor(1.0), lengthscale=torch.tensor(0.8))
    likelihood = gp.likelihoods.Gaussian(variance=torch.tensor(0.2))
    module = gp.models.VariationalSparseGP(x, x.sin(), kernel, Xu=torch.tensor([-1.5, 0.0, 1.5]), likelihood=likelihood)
    return module.model, module.guide


# --- mixtures, correlations, counts of animals -------------------------------------------------------------------


@published("Dirichlet process mixture, truncated", lambda: (fixed(6) + 2 * fixed(6, seed=1).sign(),))
def truncated_mixture() -> Programs:
    """Broken sticks, drawn assignments."""

    def model(x):
        with pyro.plate("sticks", 2):
            beta = pyro.sample("beta", dist.Beta(1.0, 1.5))
        with pyro.plate("components", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        one = torch.ones(1)
        weights = torch.cat([beta, one], -1) * torch.cat([one, (1 - beta).cumprod(-1)], -1)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(mu[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("sticks", 2):
            pyro.sample("beta", dist.Beta(positive("b_a", 2, value=1.0), positive("b_b", 2, value=1.5)))
        with pyro.plate("components", 3):
            loc = pyro.param("mu_loc", lambda: torch.tensor([-1.0, 0.2, 1.0]))
            pyro.sample("mu", dist.Normal(loc, positive("mu_sd", 3)))
        with pyro.plate("data", len(x)):
            probs = pyro.param("phi", lambda: torch.full((len(x), 3), 1 / 3), constraint=constraints.simplex)
            pyro.sample("k", dist.Categorical(probs))

    return model, guide


@published("Gaussian mixture, marginalized", lambda: (fixed(6) + 2 * fixed(6, seed=1).sign(),))
def marginal_mixture() -> Programs:
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            fn = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, torch.ones(2)))
            pyro.sample("x", fn, obs=x)

    return model, autoguide.AutoNormal(
        model, init_loc_fn=autoguide.init_to_value(values={"mu": torch.tensor([-1.0, 1])})
    )


@published("LKJ", lambda: (fixed(5, 3),))
def correlations() -> Programs:
    def model(x):
        with pyro.plate("dims", 3):
            sd = pyro.sample("sd", dist.HalfCauchy(1.0))
        chol = pyro.sample("chol", dist.LKJCholesky(3, torch.tensor(2.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=sd.unsqueeze(-1) * chol), obs=x)

    return model, autoguide.AutoMultivariateNormal(model)


@published("capture and recapture", lambda: (torch.tensor([[1.0, 0, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),))
def capture_recapture() -> Programs:
    """Cormack, Jolly, Seber: whether an animal is alive after its last capture is summed out by hand."""

    def model(captures):
        phi = pyro.sample("phi", dist.Beta(2.0, 2.0))
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        number, times = captures.shape
        unseen = [torch.ones(())]
        for _ in range(times - 1):
            unseen.append((1 - phi) + phi * (1 - p) * unseen[-1])
        last = (captures * torch.arange(times)).max(-1).values
        with pyro.plate("animals", number):
            survived = last * phi.log()
            seen = captures[:, 1:] * p.log() + (1 - captures[:, 1:]) * (1 - p).log()
            counted = torch.arange(1, times) <= last.unsqueeze(-1)
            gone = torch.stack(unseen)[(times - 1 - last).long()].log()
            pyro.factor("history", survived + torch.where(counted, seen, 0.0).sum(-1) + gone)

    return model, autoguide.AutoNormal(model)


# --- guides ------------------------------------------------------------------------------------------------------


def schools_data() -> tuple:
    return torch.tensor([28.0, 8, -3, 7]), torch.tensor([15.0, 10, 16, 11])


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 * torch.ones(())))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@published("eight schools, LocScaleReparam", schools_data)
def reparametrized() -> Programs:
    model = poutine.reparam(schools, config={"theta": reparam.LocScaleReparam(0.0)})
    return model, autoguide.AutoNormal(model)


class Easy(EasyGuide):
    """A global group of two sites that correlate, and a local one."""

    def guide(self, y, sigma):
        top = self.group(match="mu|tau")
        scale = pyro.param("tril", lambda: 0.3 * torch.eye(2), constraint=constraints.lower_cholesky)
        top.sample("top", dist.MultivariateNormal(real("top_loc", 2), scale_tril=scale))
        with self.plate("schools", len(y)):
            self.group(match="theta").sample("local", dist.Normal(real("t", 4, 1), positive("s", 4, 1)).to_event(1))


@published("eight schools, EasyGuide", schools_data)
def easy() -> Programs:
    return schools, Easy(schools)


@published("eight schools, flow guide", schools_data)
def flow_guide() -> Programs:
    return schools, autoguide.AutoNormalizingFlow(schools, lambda dim: T.affine_autoregressive(dim, [6]))
