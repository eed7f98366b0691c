"""Named settings of the ELBO: importance-weighted, penalized, over time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor

from pyro_elbo.errors import ArgumentError, check_choice, check_number, check_part
from pyro_elbo.information import AttributeSource, Estimator, MutualInformation
from pyro_elbo.objectives.elbo import TraceBeta_ELBO
from pyro_elbo.objectives.gradients import BoundKind
from pyro_elbo.objectives.importance import importance_weighted, shared_scale
from pyro_elbo.objectives.weighting import Beta, ScheduleValue
from pyro_elbo.programs import Program, TracePair, trace_filtered
from pyro_elbo.schedules import Schedule
from pyro_elbo.terms import Normalize, SequenceBound, Term, Terms, WeightOf, divisor, evaluate_run, join_numbered_sites


class TraceIW_ELBO(TraceBeta_ELBO):  # noqa: N801  (Pyro's naming)
    r"""The importance-weighted bound, per row of the data.

    .. math:: \sum_n s_n \log \frac1K \sum_k \frac{p(x_n, z_{nk})}{q(z_{nk} \mid x_n)}

    A bound on log p(x) that grows with K, with subsampling too. Latents outside of the data's plate make one weight of
    all rows, which needs the full data. ``terms.objective`` is the bound; ``terms.elbo`` stays the ELBO.

    With ``alpha``, the Rényi bound, which falls from that bound (α = 0) to the ELBO (α = 1) and below:

    .. math:: \sum_n s_n \frac{1}{1 - \alpha} \log \frac1K \sum_k
        \left(\frac{p(x_n, z_{nk})}{q(z_{nk} \mid x_n)}\right)^{1 - \alpha}

    Args:
        num_particles: the number K of particles.
        alpha: the order of the Rényi bound, 0 or more (below 0 its limit is no lower bound).
        gradient: the estimator of the gradient. ``"auto"``: pathwise; draws without a path by the score function, whose
            reward is the gain over the mean of the other particles. ``"dreg"``: doubly reparameterized, whose noise
            falls as K grows. ``"rloo"``: the reward is the gain over the bound of the other particles alone.
        options: those of :class:`TraceBeta_ELBO`; β other than 1 gives an objective that is no bound on log p(x).

    Raises:
        SiteError: the data are subsampled and a latent lies outside of their plate; scales differ between sites.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> loss = TraceIW_ELBO(num_particles=16, vectorize_particles=True)
        >>> round(loss.loss(model, guide, torch.tensor(1.0)), 4)  # the guide is the posterior: -log p(x)
        1.5155

    References:
        Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519; Li, Turner (2016), arXiv:1602.02311; Tucker, Lawson, Gu,
        Maddison (2019), arXiv:1810.04152.
    """

    def __init__(self, num_particles: int = 2, *, alpha: float = 0.0, beta: Beta = 1.0, **options: Any) -> None:
        check_number("alpha", alpha)
        self.alpha = alpha
        super().__init__(beta, num_particles=num_particles, **_with_option(options, "importance", "kl", "sampled"))

    @property
    def bound_kind(self) -> BoundKind:
        """The importance-weighted bound."""
        return "importance"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make an objective like this one, by name."""
        return super().settings | {"alpha": self.alpha}

    def bound(
        self,
        sites: Mapping[str, Term],
        weighted: Mapping[str, Tensor],
        constant: float | Tensor,
        particle_dim: int | None,
    ) -> Float[Tensor, ""]:
        """Return the importance-weighted bound: see :meth:`TraceBeta_ELBO.bound`."""
        return importance_weighted(sites, weighted, constant, particle_dim, self.alpha, self.gradient)


class TraceMI_ELBO(TraceBeta_ELBO):  # noqa: N801  (Pyro's naming)
    r"""The ELBO less a penalty on the information of a latent about an attribute.

    .. math:: E[\text{ELBO}] - \lambda N\, I_q(z; s)

    :class:`TraceBeta_ELBO` with one :class:`MutualInformation`.

    Args:
        latent: the site z, as in :class:`MutualInformation`.
        attribute: the attribute s.
        weight: λ per datum, a number or a schedule.
        estimator: the estimator of the information, as in :class:`MutualInformation`.
        beta: weight of the KL.
        conditional_on: y, for I(z; s | y).
        name: of the penalty, I(z; s) by default.
        options: those of :class:`TraceBeta_ELBO`.

    Example:
        >>> loss = TraceMI_ELBO(latent="z", attribute="s", weight=10.0, estimator="aggregate", beta=1.0)
        >>> loss.penalties[0].name
        'I(z; s)'

    References:
        Moyer, Gao, Brekelmans, Galstyan, Ver Steeg (2018), arXiv:1805.09458; Louizos, Swersky, Li, Welling, Zemel
        (2016), arXiv:1511.00830.
    """

    def __init__(
        self,
        latent: str,
        attribute: AttributeSource | None = None,
        weight: float | Schedule = 1.0,
        estimator: Estimator = "aggregate",
        beta: Beta = 1.0,
        *,
        conditional_on: AttributeSource | None = None,
        name: str = "",
        **options: Any,
    ) -> None:
        given = options.pop("given", None)
        penalty = MutualInformation(latent, attribute, weight, estimator, conditional_on, name=name, given=given)
        super().__init__(beta, penalties=(penalty, *options.pop("penalties", ())), **options)


class TraceTimestep_ELBO(TraceBeta_ELBO):  # noqa: N801  (Pyro's naming)
    r"""The bound of a sequence model, step by step.

    .. math:: \sum_t E_q[\log p(x_t \mid z_{\le t}, x_{<t})]
        - \sum_t \beta_t\, E_q[KL(q(z_t \mid z_{<t}, x) \,\|\, p(z_t \mid z_{<t}, x_{<t}))]

    Terms have a dimension ``time``: those of :func:`pyro_elbo.scan`, and those of loops over ``z_0, z_1, ...``, which
    become one term ``z``. The guide may filter (q(z_t | x_1, ..., x_t)) or smooth (q(z_t | x_{1:T})).

    Args:
        beta: as in :class:`TraceBeta_ELBO`; a tensor of shape (T,) is a β per step.
        normalize: the divisor of the objective: ``"total"`` none, ``"sequence"`` the number of sequences,
            ``"frame"`` the number of real frames (lengths and masks), ``"step"`` T. The other numbers of the terms stay
            totals.
        bound: ``"elbo"``; ``"importance"``: the log of the mean weight of ``num_particles`` particles, per sequence;
            ``"filtering"``: the same with resampling, which stays tight for long sequences (model and guide draw
            all latents in one pe.scan each; ``terms.elbo`` is then an average over resampled particles, no bound).
        resample: with ``"filtering"``, a sequence resamples where its effective sample size is below this part of the
            particles; 1 resamples at every step, 0 never.
        options: those of :class:`TraceBeta_ELBO`.

    Raises:
        SiteError: the numbered sites of a loop differ in their plates.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     z = torch.tensor(0.0)
        ...     for t in range(len(x)):
        ...         z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        ...         pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])
        >>> def guide(x):
        ...     for t in range(len(x)):
        ...         pyro.sample(f"z_{t}", dist.Normal(x[t], 0.7))
        >>> TraceTimestep_ELBO().terms(model, guide, torch.zeros(5)).kl["z"].shape
        torch.Size([5])

    References:
        Chung et al. (2015), arXiv:1506.02216; Krishnan, Shalit, Sontag (2017), arXiv:1609.09869; Maddison et al.
        (2017), arXiv:1705.09279.
    """

    def __init__(
        self,
        beta: Beta = 1.0,
        *,
        normalize: Normalize = "total",
        bound: SequenceBound = "elbo",
        resample: float = 0.5,
        **options: Any,
    ) -> None:
        self.normalize: Normalize = normalize
        self._bound_kind: SequenceBound = bound
        self.resample = resample
        check_choice("normalize", normalize, get_args(Normalize))
        check_choice("bound", bound, get_args(SequenceBound))
        check_part("resample", resample)
        if bound != "elbo":
            options = _with_option(options, bound, "kl", "sampled")
        if bound == "filtering":
            options = _with_option(options, bound, "vectorize_particles", True)
        super().__init__(beta, **options)
        if bound == "filtering" and self.num_particles < 2:
            raise ArgumentError(f"bound='filtering' needs num_particles >= 2, got {self.num_particles}.")
        if bound == "filtering" and not self.weighting.is_identity():
            raise ArgumentError("bound='filtering' is a bound at beta=1: it takes neither beta nor free_bits.")

    @property
    def bound_kind(self) -> BoundKind:
        """The argument ``bound``."""
        return self._bound_kind

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make an objective like this one, by name."""
        own = {"normalize": self.normalize, "bound": self.bound_kind, "resample": self.resample}
        return super().settings | own

    @property
    def loss_units(self) -> str:
        """The units of the loss of training by epochs: nats per sequence, frame, step or datum."""
        return super().loss_units if self.normalize == "total" else f"nats per {self.normalize}"

    def evaluate(
        self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any], value: ScheduleValue
    ) -> Terms:
        """Return the terms with a normalized objective: see :meth:`TraceBeta_ELBO.evaluate`."""
        terms = super().evaluate(model, guide, args, kwargs, value)
        if self.normalize == "total":
            return terms
        count = divisor(terms.sites, terms.particle_dim, self.normalize)
        return replace(terms, objective=terms.objective / count, divisor=count)

    def _unpenalized(
        self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any], value: ScheduleValue
    ) -> Terms:
        if self.bound_kind == "filtering":
            return self._filtered(model, guide, args, kwargs)
        return super()._unpenalized(model, guide, args, kwargs, value)

    def bound(
        self,
        sites: Mapping[str, Term],
        weighted: Mapping[str, Tensor],
        constant: float | Tensor,
        particle_dim: int | None,
    ) -> Float[Tensor, ""]:
        """Return the ELBO or the importance-weighted bound: see :meth:`TraceBeta_ELBO.bound`."""
        if self.bound_kind == "importance":
            return importance_weighted(sites, weighted, constant, particle_dim, gradient=self.gradient)
        return super().bound(sites, weighted, constant, particle_dim)

    def _filtered(self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]) -> Terms:
        nesting = self._nesting(model, guide, args, kwargs)
        pair, log_evidence = trace_filtered(model, guide, args, kwargs, self.num_particles, nesting, self.resample)
        sites = evaluate_run(pair, "sampled")
        return Terms(sites, pair.particle_dim, log_evidence.sum() * shared_scale(sites))

    def _terms_of(
        self, runs: Sequence[Sequence[TracePair]], weight_of: WeightOf | None
    ) -> tuple[dict[str, Term], int | None]:
        sites, particle_dim = super()._terms_of(runs, weight_of)
        return join_numbered_sites(sites), particle_dim


def _with_option(options: dict[str, Any], bound: str, name: str, needed: Any) -> dict[str, Any]:
    """Return options with the value that a bound needs; another one is refused."""
    given = options.get(name, needed)
    if not isinstance(given, type(needed)) or given != needed:
        raise ArgumentError(f"The {bound} bound needs {name}={needed!r}, got {given!r}. Leave {name} out.")
    return options | {name: needed}
