"""A β-VAE of brain volumes with a linear decoder: maps of the task, shared by all, and maps of subjects.

    z_task[n] ~ Normal(0, I_k) per trial,    z_subject[s] ~ Normal(0, I_j) per subject
    x_n ~ Normal(W z_task[n] + U z_subject[s(n)] + μ, σ² I_D)
    q(z_task[n] | x_n, z_subject) = Normal(linear, diag(scale²)),    q(z_subject[s]) = Normal(loc_s, diag(scale_s²))

Why do the columns of W align with contrasts, though W R explains x as well for every rotation R? Let the KL of z_task
weigh β, and let S be the covariance of x without its subjects' share. At the best encoder the objective per trial is

    β [E log Normal(x; μ, W Wᵀ + βσ² I) - ½ (Σ_i log M_ii - log|M|)] + const,    M = Wᵀ W + βσ² I.

The last term is what a diagonal posterior loses. It vanishes for orthogonal columns only, so W has the principal axes
of S (Lucas, Tucker, Grosse, Norouzi 2019, arXiv:1911.02469; Rolinek, Zietlow, Martius 2019, arXiv:1812.06775), and it
pushes with the weight β: at β = 0 nothing turns W, and in a limited training a larger β turns it further. The first
term is probabilistic PCA with noise βσ²: axes of variance below βσ² get columns of zero. So a large β removes noise,
then the weak contrasts. Principal axes are contrasts where these are orthogonal and differ in variance.
"""

from dataclasses import dataclass
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus


class TaskVAE(nn.Module):
    """Model and guide: ``model(x, subject)`` and ``guide(x, subject)``.

    Latents are ``z_task`` in the plate ``trials`` and ``z_subject`` in the plate ``subjects``; x is observed.

    Args:
        voxels: columns of x.
        subjects: number of subjects, or of runs of one subject.
        task_dim: columns of W; what is not needed is pruned by β.
        subject_dim: columns of U.
    """

    def __init__(self, voxels: int, subjects: int, *, task_dim: int = 6, subject_dim: int = 2) -> None:
        super().__init__()
        self.task_maps = nn.Parameter(0.1 * torch.randn(voxels, task_dim))
        self.subject_maps = nn.Parameter(0.1 * torch.randn(voxels, subject_dim))
        self.mean = nn.Parameter(torch.zeros(voxels))
        self.raw_noise = nn.Parameter(torch.tensor(0.5))
        self.encoder = nn.Linear(voxels + subject_dim, task_dim)
        self.raw_task_scale = nn.Parameter(torch.zeros(task_dim))
        self.subject_loc = nn.Parameter(torch.zeros(subjects, subject_dim))
        self.raw_subject_scale = nn.Parameter(torch.zeros(subjects, subject_dim))

    def model(self, x: Float[Tensor, "n voxels"], subject: Int[Tensor, " n"]) -> None:
        pyro.module("task_vae", self)
        with pyro.plate("subjects", len(self.subject_loc)):
            z_subject = pyro.sample("z_subject", dist.Normal(torch.zeros_like(self.subject_loc[0]), 1.0).to_event(1))
        with pyro.plate("trials", len(x)):
            z_task = pyro.sample("z_task", dist.Normal(torch.zeros_like(self.task_maps[0]), 1.0).to_event(1))
            of_subject = (z_subject @ self.subject_maps.T)[..., subject, :]
            pyro.sample("x", dist.Normal(self.decode(z_task) + of_subject, self.noise).to_event(1), obs=x)

    def guide(self, x: Float[Tensor, "n voxels"], subject: Int[Tensor, " n"]) -> None:
        pyro.module("task_vae", self)
        with pyro.plate("subjects", len(self.subject_loc)):
            scale = softplus(self.raw_subject_scale) + 1e-4
            z_subject = pyro.sample("z_subject", dist.Normal(self.subject_loc, scale).to_event(1))
        with pyro.plate("trials", len(x)):
            pyro.sample("z_task", dist.Normal(*self.encode(x, z_subject[..., subject, :])).to_event(1))

    def encode(
        self, x: Float[Tensor, "n voxels"], z_subject: Float[Tensor, "*particles n subject_dim"]
    ) -> tuple[Float[Tensor, "*particles n task_dim"], Float[Tensor, " task_dim"]]:
        """Mean and standard deviation of q(z_task | x, z_subject), given the subject's z for each trial."""
        inputs = torch.cat([x.expand(*z_subject.shape[:-1], -1), z_subject], -1)
        return self.encoder(inputs), softplus(self.raw_task_scale) + 1e-4

    def decode(self, z_task: Float[Tensor, "*batch task_dim"]) -> Float[Tensor, "*batch voxels"]:
        """Mean volume of a subject at 0."""
        return z_task @ self.task_maps.T + self.mean

    @property
    def noise(self) -> Tensor:
        """σ."""
        return softplus(self.raw_noise) + 1e-2


class Optimum(NamedTuple):
    """The best W and σ of a linear β-VAE."""

    maps: Float[Tensor, "voxels k"]
    noise: float


def optimum(cov: Float[Tensor, "voxels voxels"], k: int, beta: float) -> Optimum:
    """Return the global optimum for data of covariance S: W = V (Λ - βσ²)₊^½ with the k first axes V of S.

    With K axes above βσ² the expected squared residual is the variance of all others, plus βσ² for each of the K:
    D σ² = Σ_{i > K} λ_i + K β σ². Of all K with such a σ the best has the least D log σ² + β Σ_{i ≤ K} log(λ_i / βσ²),
    which is -2 times the objective up to a constant.
    """
    values, axes = (part.flip(-1) for part in torch.linalg.eigh(cov))
    costs = {}
    for kept in range(k + 1):
        share = len(values) - kept * beta
        variance = values[kept:].sum() / share
        if share > 0 and (values[:kept] > beta * variance).all():
            cost = len(values) * variance.log() + beta * (values[:kept] / (beta * variance)).log().sum()
            costs[kept, variance.item()] = cost.item()
    kept, variance = min(costs, key=costs.__getitem__)
    gains = (values[:k] - beta * variance).clamp(min=0).sqrt() * (torch.arange(k) < kept)
    return Optimum(axes[:, :k] * gains, variance**0.5)


def matched_cosines(
    maps: Float[Tensor, "voxels k"], truth: Float[Tensor, "voxels contrasts"]
) -> tuple[Float[Tensor, " contrasts"], Int[Tensor, " contrasts"]]:
    """Match a column to each true contrast, one to one, for the largest sum of absolute cosines.

    Returns:
        The absolute cosines, and the columns. A column of zeros has the cosine 0.
    """
    from scipy.optimize import linear_sum_assignment

    cosines = (normalize(truth, dim=0).T @ normalize(maps, dim=0)).abs()
    columns = torch.as_tensor(linear_sum_assignment(cosines.numpy(), maximize=True)[1])
    return cosines.gather(1, columns[:, None])[:, 0], columns


@dataclass(frozen=True)
class Simulator:
    """Volumes of a factorial experiment with three contrasts of two levels each, in several subjects.

    x = Σ_k a_k l_k m_k + offset of the subject + ε with levels l_k = ±1 in all combinations equally often and
    ε ~ Normal(0, I). The maps m_k, of length 1, are disjoint: one patch responds to each level. So they are orthogonal
    principal axes of variance a_k² + 1. A subject's offset mixes two smooth maps that overlap the contrasts.

    Attributes:
        amplitudes: a_k, in units of the noise.
        side: height and width of the slice in voxels.
        repeats: how often each subject sees each of the eight combinations.
        offset: size of a subject's share of each smooth map, in units of the noise.
    """

    amplitudes: tuple[float, ...] = (4.0, 3.0, 2.2)
    side: int = 12
    subjects: int = 8
    repeats: int = 8
    offset: float = 8.0

    @property
    def contrasts(self) -> Float[Tensor, "voxels contrasts"]:
        """The true maps m_k."""
        maps = torch.zeros(len(self.amplitudes), self.side, self.side)
        for k, image in enumerate(maps):
            row = 1 + k * self.side // len(maps)
            image[row : row + 2, 1:4] = 1.0
            image[row : row + 2, -4:-1] = -1.0
        return normalize(maps.flatten(1), dim=1).T

    @property
    def offsets(self) -> Float[Tensor, "subjects voxels"]:
        """The mean volumes of the subjects."""
        line = torch.linspace(-1, 1, self.side)
        smooth = torch.stack([1 - line[:, None] ** 2 - line**2 / 2, line[:, None] + line]).flatten(1)
        weights = torch.randn(self.subjects, 2, generator=torch.Generator().manual_seed(7))
        return self.offset * weights @ normalize(smooth, dim=1)

    def draw(self, seed: int) -> "Trials":
        """Draw all trials of an experiment; its subjects are the same for every seed."""
        noise = torch.Generator().manual_seed(seed)
        levels = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * len(self.amplitudes))
        levels = levels.repeat(self.subjects * self.repeats, 1)
        subject = torch.arange(self.subjects).repeat_interleave(len(levels) // self.subjects)
        x = levels * torch.tensor(self.amplitudes) @ self.contrasts.T + self.offsets[subject]
        return Trials(x + torch.randn(x.shape, generator=noise), subject, levels)


class Trials(NamedTuple):
    """Volumes, the subject of each, and the levels (±1) of the factors in it."""

    x: Float[Tensor, "n voxels"]
    subject: Int[Tensor, " n"]
    levels: Float[Tensor, "n contrasts"]


def covariance_within(x: Float[Tensor, "n voxels"], subject: Int[Tensor, " n"]) -> Float[Tensor, "voxels voxels"]:
    """Return the covariance of volumes less the mean of their subject, in double precision."""
    x = x.double()
    means = torch.stack([x[subject == s].mean(0) for s in range(int(subject.max()) + 1)])
    return torch.cov((x - means[subject]).T, correction=0)
