r"""The decomposition of a latent's average KL into information, total correlation and dimension-wise KL.

.. math:: \frac1N \sum_i KL(q(z \mid x_i) \,\|\, p(z)) = I_q(z; x) + KL\Big(q(z) \,\Big\|\, \prod_d q(z_d)\Big)
    + \sum_d KL(q(z_d) \,\|\, p(z_d))

where q(z) is the aggregate posterior of the full data. The identity holds for any density in place of q(z), so the sum
cannot reveal an error in its estimate.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.errors import DataError, SiteError, check_count, check_name
from pyro_elbo.information import AggregatePosterior, Mixture, in_blocks
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.programs import Program, check_options, seeded
from pyro_elbo.terms import Term, Terms, univariate


@dataclass(frozen=True)
class KLDecomposition:
    """The parts of a latent's KL in nats per datum; print it for a table.

    Attributes:
        latent: the site.
        kl: the average KL to the prior; the sum of the next three.
        mutual_information: I_q(z; x), the information of a draw on its datum; at most log N.
        total_correlation: KL of q(z) to the product of its marginals.
        dimension_wise_kl: sum of the KLs of the marginals of q(z) to those of the prior.
        per_dimension: the dimension-wise KL of each dimension.
        standard_error: standard error over rows of each of the four numbers, by name.
        rows: number of rows that q(z) was estimated from.
        full_size: number of rows that q(z) is the mixture of.
    """

    latent: str
    kl: float
    mutual_information: float
    total_correlation: float
    dimension_wise_kl: float
    per_dimension: Float[Tensor, "dimensions"]
    standard_error: dict[str, float]
    rows: int
    full_size: int

    def __str__(self) -> str:
        names = {
            "kl": "average KL to the prior",
            "mutual_information": "I(z; x): what is kept of each datum",
            "total_correlation": "total correlation of the dimensions",
            "dimension_wise_kl": "dimensions against the prior",
        }
        of = f"all {self.rows} rows" if self.rows == self.full_size else f"{self.rows} of {self.full_size} rows"
        lines = [f"KL of '{self.latent}' in nats per datum, from {of}"]
        for name, words in names.items():
            sign = "  " if name == "kl" else "= " if name == "mutual_information" else "+ "
            lines.append(f"{sign}{getattr(self, name):8.3f} ± {self.standard_error[name]:.3f}  {words}")
        return "\n".join(lines)


def kl_decomposition(
    model: Program,
    guide: Program,
    *args: Any,
    latent: str | None = None,
    num_samples: int = 1,
    seed: int | None = 0,
    **kwargs: Any,
) -> KLDecomposition:
    r"""Decompose the average KL of a latent: information on the datum, total correlation, dimensions against prior.

    On the full data q(z) is exact, and only the draws are random. Where the latent's plate subsamples, the densities
    are weighted as in the full data (``Mixture.of_full_data``): a rough estimate, I(z; x) too high and the total
    correlation too low. Pairs of rows are compared in blocks, which bounds memory; time grows with rows² × dimensions.

    Args:
        model: the generative program.
        guide: its variational posterior.
        args: their arguments.
        latent: the site; the only latent of the data's plate if omitted.
        num_samples: number of draws per row, which are averaged.
        seed: seed of the draws; torch's own stream is left as it was. None draws from that stream.
        kwargs: further arguments of the programs.

    Raises:
        SiteError: the latent is missing, or its guide or prior has no density that factorizes over dimensions.
        ArgumentError: ``num_samples`` is less than 1.
        DataError: there is a single row.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.8 * x, 0.45).to_event(1))
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 1.25**0.5
        >>> parts = kl_decomposition(model, guide, x)
        >>> print(parts)
        KL of 'z' in nats per datum, from all 500 rows
             1.646 ± 0.044  average KL to the prior
        =    1.578 ± 0.045  I(z; x): what is kept of each datum
        +    0.025 ± 0.008  total correlation of the dimensions
        +    0.043 ± 0.026  dimensions against the prior

    References:
        Hoffman, Johnson (2016), ELBO surgery, NeurIPS workshop; Chen, Li, Grosse, Duvenaud (2018), arXiv:1802.04942;
        Esmaeili et al. (2019), arXiv:1804.02086.
    """
    check_options(model, kwargs)
    check_count("num_samples", num_samples)
    if latent is not None:
        check_name("latent", latent)
    loss = TraceBeta_ELBO()
    found = []
    with torch.no_grad(), seeded(seed):
        for _ in range(num_samples):
            terms = loss.terms(model, guide, *args, **kwargs)
            name = _only_latent(terms, latent)
            found.append(_parts(terms.sites[name]))
    return _summary(name, torch.stack(found), terms.sites[name])


def _only_latent(terms: Terms, latent: str | None) -> str:
    local = [n for n, t in terms.sites.items() if t.kind == "latent" and t.plates and t.draws]
    if latent in local or (latent is None and len(local) == 1):
        return latent or local[0]
    shared = [n for n, t in terms.sites.items() if t.kind == "latent" and not t.plates]
    if latent in shared or (latent is None and not local and shared):
        name = latent or shared[0]
        raise SiteError(
            f"Latent '{name}' lies in no plate: all data share one value, so that there is no aggregate posterior to "
            f"decompose its KL with. Name a latent of the data's plate, or read terms.kl['{name}']."
        )
    latents = [(n, t) for n, t in terms.sites.items() if t.kind == "latent"]
    if enumerated := [n for n, t in latents if t.plates and (t.posterior is not None or t.expected)]:
        raise SiteError(
            f"The sites {enumerated} are enumerated, or depend on one that is: there is no draw of each whose density "
            "could be compared with those of other rows. Draw them in the guide, without marks, or name a latent "
            "that it draws once per row."
        )
    asked = "Several latents lie in plates" if latent is None else f"'{latent}' is no latent inside of a plate"
    raise SiteError(f"{asked}: expected one of {local}. Pass latent=... with its name.")


def _parts(term: Term) -> Float[Tensor, "rows parts"]:
    """Return each row's information, total correlation, and KL to the prior by dimension."""
    plate, (site,) = term.plates[0], term.draws
    if plate.size < 2:
        raise DataError(
            f"Latent '{term.name}': expected at least 2 rows of '{plate.name}' for an aggregate posterior, got "
            f"{plate.size}. Read terms.kl['{term.name}'] of a single row."
        )
    encoded = AggregatePosterior(site, plate, None)
    if term.per_dim is None and site.event_dim:
        raise SiteError(
            f"Latent '{term.name}': prior and guide must factorize over its dimensions for a decomposition by "
            f"dimension; the guide is {type(site.fn).__name__}. Use distributions with .to_event(n)."
        )
    to_prior = encoded.like_draws(term.nats if term.per_dim is None else term.per_dim())[0]
    entropy = encoded.like_draws(univariate(site.fn).entropy())[0] if term.is_analytic else None

    pairs = encoded.pairs_per_element

    def block(start: int, stop: int) -> tuple[Tensor, ...]:
        elements = pairs(start, stop)
        joint, marginals = (Mixture.of(x, encoded.rows, start) for x in (elements.sum(2), elements.transpose(1, 2)))
        return joint.of_full_data(plate.full_size), marginals.of_full_data(plate.full_size).mT, marginals.own.mT

    joint, marginal, own = (x[0] for x in in_blocks(block, plate.size, plate.size * to_prior.shape[-1]))
    own = own if entropy is None else -entropy
    information = own.sum(-1) - joint
    correlation = joint - marginal.sum(-1)
    dimensions = marginal - own + to_prior  # log p(z_d) = log q(z_d | x) - (log q - log p)
    parts = torch.cat([information.unsqueeze(-1), correlation.unsqueeze(-1), dimensions], -1)
    return parts[encoded.rows]


def _summary(name: str, parts: Float[Tensor, "samples rows parts"], term: Term) -> KLDecomposition:
    per_row = parts.mean(0)
    rows = {
        "kl": per_row.sum(-1),
        "mutual_information": per_row[:, 0],
        "total_correlation": per_row[:, 1],
        "dimension_wise_kl": per_row[:, 2:].sum(-1),
    }
    errors = {part: (x.std() / len(x) ** 0.5).item() for part, x in rows.items()}
    means = {part: x.mean().item() for part, x in rows.items()}
    plate = term.plates[0]
    return KLDecomposition(
        name,
        **means,
        per_dimension=per_row[:, 2:].mean(0),
        standard_error=errors,
        rows=len(per_row),
        full_size=plate.full_size,
    )
