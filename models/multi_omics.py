r"""A variational autoencoder of cells that were seen by RNA counts, by accessibility peaks, or by both.

    z_n ~ Normal(0, I),   loadings W, V ~ Laplace(0, b)
    genes_ng | z_n ~ NegativeBinomial(mean m = total_n softmax(a + z_n W)_g,  variance m + m² / inverse_dispersion_g)
    peaks_np | z_n ~ Bernoulli(logit = c_p + log(opened_n / mean opened) + (z_n V)_p)
    q(z_n | genes_n, peaks_n) ∝ Normal(z_n; 0, I) ∏_{m seen} Normal(z_n; mean_m(x_nm), diag(scale_m(x_nm)²))

The size factors total_n and opened_n of a cell, how many molecules and open peaks it shows, are given and not
modeled. A modality that was not seen contributes neither its expert nor its likelihood. The prior is a factor of q
once, whatever was seen: a cell without data has q(z) = p(z).

A Gaussian prior on z does not change under rotations, so the likelihood alone cannot tell programs from their mixtures.
The Laplace prior does change: of all rotations it prefers the one in which most loadings are zero. Where every gene and
peak belongs to few programs, these are the programs, up to order and sign.

Wu, Goodman (2018), Multimodal generative models for scalable weakly-supervised learning, arXiv:1802.05335; Ashuach,
Gabitto, Koodli, Saldi, Jordan, Yosef (2023), MultiVI, Nature Methods 20.
"""

from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softplus

SMALLEST_SCALE = 1e-3


class Cells(NamedTuple):
    """Cells with two modalities.

    Attributes:
        genes: counts of molecules per gene.
        peaks: 1 for open peaks, 0 for closed ones.
        seen: which of (genes, peaks) were seen; the values of others have no effect and may be NaN.
    """

    genes: Float[Tensor, "n genes"]
    peaks: Float[Tensor, "n peaks"]
    seen: Bool[Tensor, "n 2"]

    def rows(self, chosen: Tensor) -> "Cells":
        """Return some of the cells."""
        return Cells(*(column[chosen] for column in self))

    def only(self, *, genes: bool = False, peaks: bool = False) -> "Cells":
        """Return the cells with the other modalities hidden."""
        return self._replace(seen=self.seen & torch.tensor([genes, peaks]))


class MultiOmics(nn.Module):
    """Model and guide: ``model(genes, peaks, seen)`` and ``guide(genes, peaks, seen)``, the columns of :class:`Cells`.

    Observed sites are ``genes`` and ``peaks``. Latents are ``z``, one row a cell, and ``loadings``, of shape
    (z_dim, genes + peaks) and shared by all cells.

    Args:
        cells: the data of the fit; they give the sizes, the number of rows, and the profile to start from.
        z_dim: latent dimensions.
        hidden: width of the encoders.
        sparsity: the scale b of the loadings.
    """

    def __init__(self, cells: Cells, *, z_dim: int = 4, hidden: int = 64, sparsity: float = 0.05) -> None:
        super().__init__()
        self.size, self.z_dim, self.sparsity = len(cells.seen), z_dim, sparsity
        self.sizes = [cells.genes.shape[1], cells.peaks.shape[1]]
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(n, hidden), nn.Softplus(), nn.Linear(hidden, 2 * z_dim)) for n in self.sizes
        )
        moments = [moments_of(x[seen]) for x, seen in zip(features(cells), cells.seen.T, strict=True)]
        self.center, self.spread = (torch.nn.Buffer(torch.cat(part)) for part in zip(*moments, strict=True))
        self.loading_loc = nn.Parameter(0.1 * torch.randn(z_dim, sum(self.sizes)))
        self.loading_raw = nn.Parameter(torch.full((z_dim, sum(self.sizes)), -3.0))
        genes, peaks = clean(cells)
        self.opened_mean = float(peaks.sum(1)[cells.seen[:, 1]].mean()) if cells.seen[:, 1].any() else 1.0
        share = (genes.sum(0) + 0.5) / (genes + 0.5).sum()
        opened = (peaks.sum(0) + 0.5) / (cells.seen[:, 1].sum() + 1)
        self.profile = nn.Parameter(torch.cat([share.log(), opened.logit()]))
        self.raw_dispersion = nn.Parameter(torch.ones(self.sizes[0]))

    def model(
        self, genes: Float[Tensor, "n genes"], peaks: Float[Tensor, "n peaks"], seen: Bool[Tensor, "n 2"]
    ) -> Float[Tensor, "*particles n z_dim"]:
        cells = Cells(genes, peaks, seen)
        zeros = self.profile.new_zeros(self.z_dim, sum(self.sizes))
        loadings = pyro.sample("loadings", dist.Laplace(zeros, self.sparsity).to_event(2))
        with self._data(cells):
            z = pyro.sample("z", dist.Normal(zeros[:, 0], 1.0).to_event(1))
            self._observe(z, loadings, cells)
        return z

    def guide(
        self, genes: Float[Tensor, "n genes"], peaks: Float[Tensor, "n peaks"], seen: Bool[Tensor, "n 2"]
    ) -> Float[Tensor, "*particles n z_dim"]:
        cells = Cells(genes, peaks, seen)
        pyro.sample("loadings", dist.Normal(self.loading_loc, self.loading_scale).to_event(2))
        with self._data(cells):
            return pyro.sample("z", dist.Normal(*self.encode(cells)).to_event(1))

    def means(
        self, genes: Float[Tensor, "n genes"], peaks: Float[Tensor, "n peaks"], seen: Bool[Tensor, "n 2"]
    ) -> None:
        """Observe the cells without latents: a program in which all have one profile, but their own size factors."""
        cells, no_programs = Cells(genes, peaks, seen), self.profile.new_zeros(self.z_dim, sum(self.sizes))
        with self._data(cells):
            self._observe(no_programs[:, 0].expand(len(seen), -1), no_programs, cells)

    @property
    def loading_scale(self) -> Float[Tensor, "z_dim genes_and_peaks"]:
        """Standard deviations of q(loadings)."""
        return softplus(self.loading_raw) + SMALLEST_SCALE

    def encode(self, cells: Cells) -> tuple[Float[Tensor, "n z_dim"], Float[Tensor, "n z_dim"]]:
        """Mean and standard deviation of q(z | what was seen)."""
        inputs = (torch.cat(features(cells), 1) - self.center) / self.spread
        parts = zip(self.experts, inputs.split(self.sizes, 1), strict=True)
        locs, raws = zip(*(expert(x).chunk(2, -1) for expert, x in parts), strict=True)
        scales = softplus(torch.stack(raws)) + SMALLEST_SCALE
        return product_of_experts(torch.stack(locs), scales, cells.seen.T)

    def likelihoods(
        self, z: Float[Tensor, "*particles n z_dim"], loadings: Tensor, cells: Cells
    ) -> tuple[dist.Independent, dist.Independent]:
        """Return p(genes | z) and p(peaks | z), with the size factors of the cells."""
        counts, opened = clean(cells)
        total, size = (x.sum(1, keepdim=True).clamp(min=1).log() for x in (counts, opened))
        of_genes, of_peaks = (self.profile + (z.unsqueeze(-2) @ loadings).squeeze(-2)).split(self.sizes, -1)
        inverse_dispersion = softplus(self.raw_dispersion) + SMALLEST_SCALE
        log_mean = total + log_softmax(of_genes, -1)
        genes = dist.NegativeBinomial(inverse_dispersion, logits=log_mean - inverse_dispersion.log())
        peaks = dist.Bernoulli(logits=of_peaks + size - np.log(self.opened_mean))
        return genes.to_event(1), peaks.to_event(1)

    @torch.no_grad()
    def log_predictive(
        self, shown: Cells, cells: Cells, draws: int = 100
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return log p(genes | shown) and log p(peaks | shown) of every cell in nats, averaged over draws of q.

        Args:
            shown: what the encoder may see of the cells.
            cells: the same cells with all that is to be predicted.
            draws: how many draws of the loadings and of z | shown are averaged.
        """
        observed, nats = clean(cells), []
        for _ in range(draws):
            loadings = dist.Normal(self.loading_loc, self.loading_scale).sample()
            given = self.likelihoods(dist.Normal(*self.encode(shown)).sample(), loadings, cells)
            nats.append(torch.stack([d.log_prob(x) for d, x in zip(given, observed, strict=True)]))
        genes, peaks = torch.stack(nats).logsumexp(0) - np.log(draws)
        return genes, peaks

    def _observe(self, z: Float[Tensor, "*particles n z_dim"], loadings: Tensor, cells: Cells) -> None:
        names, likelihoods = ("genes", "peaks"), self.likelihoods(z, loadings, cells)
        for name, given, x, seen in zip(names, likelihoods, clean(cells), cells.seen.T, strict=True):
            pyro.sample(name, given.mask(seen), obs=x)

    def _data(self, cells: Cells) -> pyro.plate:
        pyro.module("multiomics", self)
        rows = len(cells.seen)
        return pyro.plate("cells", self.size, subsample=None if rows == self.size else torch.arange(rows))


def clean(cells: Cells) -> tuple[Float[Tensor, "n genes"], Float[Tensor, "n peaks"]]:
    """Return genes and peaks with zeros where they were not seen."""
    parts = (cells.genes, cells.peaks)
    genes, peaks = (torch.where(seen[:, None], x, 0.0) for x, seen in zip(parts, cells.seen.T, strict=True))
    return genes, peaks


def features(cells: Cells) -> tuple[Float[Tensor, "n genes"], Float[Tensor, "n peaks"]]:
    """Return what the experts see: log(1 + share of a gene, times the number of genes), and the peaks."""
    genes, peaks = clean(cells)
    shares = genes / genes.sum(1, keepdim=True).clamp(min=1)
    return torch.log1p(shares * genes.shape[1]), peaks


def moments_of(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Return mean and standard deviation of every column, and 1 in place of a deviation that is 0 or unknown."""
    if len(x) < 2:
        return x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    spread = x.std(0)
    return x.mean(0), torch.where(spread > 0, spread, 1.0)


def product_of_experts(
    locs: Float[Tensor, "experts n d"], scales: Float[Tensor, "experts n d"], seen: Bool[Tensor, "experts n"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Multiply the seen experts with one standard normal prior: mean and standard deviation of the product.

    Precisions add, 1 / scale² = 1 + Σ 1 / scale_m², and so do means times precisions.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> product_of_experts(2 * one, one, torch.ones(1, 1, dtype=torch.bool))[0]
        tensor([[1.]])
    """
    precisions = torch.where(seen[..., None], scales.reciprocal().square(), 0.0)
    precision = 1 + precisions.sum(0)
    return (precisions * locs).sum(0) / precision, precision.rsqrt()


@dataclass(frozen=True)
class Simulator:
    """Cells of the model itself, with programs of which each has genes and peaks of its own.

    Of the loadings of a program, 70 % are positive, and their sizes are uniform between 0.4 and 1.4. Genes and peaks of
    no program have loadings of 0. Cells show 500 molecules in the median.

    Attributes:
        programs: number of programs.
        genes, peaks: features of each program.
        others: genes, and pairs of peaks, of no program.
        inverse_dispersion: of the genes.
    """

    programs: int = 4
    genes: int = 20
    peaks: int = 40
    others: int = 40
    inverse_dispersion: float = 5.0

    def loadings(self) -> tuple[Float[Tensor, "programs genes"], Float[Tensor, "programs peaks"]]:
        """Return the true loadings of genes and peaks."""
        generator, blocks = torch.Generator().manual_seed(7), []
        for own, others in ((self.genes, self.others), (self.peaks, 2 * self.others)):
            sign = torch.where(torch.rand(self.programs, own, generator=generator) < 0.7, 1.0, -1.0)
            size = 0.4 + torch.rand(self.programs, own, generator=generator)
            blocks.append(torch.cat([torch.block_diag(*(sign * size)), torch.zeros(self.programs, others)], 1))
        return blocks[0], blocks[1]

    def draw(self, n: int, seed: int) -> tuple[Cells, Float[Tensor, "n programs"]]:
        """Draw cells that were seen by both modalities, and the activities of their programs."""
        pyro.set_rng_seed(seed)
        of_genes, of_peaks = self.loadings()
        levels = torch.linspace(-1.0, 1.0, of_genes.shape[1]), torch.linspace(-3.0, 0.0, of_peaks.shape[1])
        profile, baseline = (x[torch.randperm(len(x), generator=torch.Generator().manual_seed(7))] for x in levels)
        z = torch.randn(n, self.programs)
        total, depth = 500 * torch.exp(0.4 * torch.randn(n, 1)), 0.3 * torch.randn(n, 1)
        mean = total * torch.softmax(profile + z @ of_genes, -1)
        genes = dist.GammaPoisson(self.inverse_dispersion, self.inverse_dispersion / mean).sample()
        peaks = torch.bernoulli(torch.sigmoid(baseline + depth + z @ of_peaks))
        return Cells(genes, peaks, torch.ones(n, 2, dtype=torch.bool)), z


def hide(cells: Cells, share: float, seed: int) -> Cells:
    """Return the cells with the genes of a random share hidden, and the peaks of another such share."""
    luck = torch.rand(len(cells.seen), generator=torch.Generator().manual_seed(seed))
    return cells._replace(seen=cells.seen & torch.stack([luck >= share, luck < 1 - share], 1))


def load_scicar(path: str | PathLike) -> tuple[Cells, Int[Tensor, " n"]]:
    """Sci-CAR's A549 cells, all seen by both modalities, and their hours of dexamethasone (0, 1 or 3)."""
    with np.load(path, allow_pickle=False) as data:
        genes = torch.from_numpy(data["rna_counts"].astype(np.float32))
        peaks = np.unpackbits(data["atac_binary_packed"], axis=1)[:, : int(data["n_peaks"])].astype(np.float32)
        hours = torch.from_numpy(data["time_hours"].astype(np.int64))
    return Cells(genes, torch.from_numpy(peaks), torch.ones(len(genes), 2, dtype=torch.bool)), hours
