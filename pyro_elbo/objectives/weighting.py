r"""The weights of the KL: β, schedules, capacity and free bits.

.. math:: \text{objective} = \sum \log p(x \mid z) - \sum_s \text{weighted}_s

A weighting never changes the terms. It returns, site by site, the charge in place of the KL.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from pyro_elbo import ranks
from pyro_elbo.errors import ArgumentError, check_count, check_name, check_number, describe
from pyro_elbo.objectives.free_bits import floor_joint, floor_site
from pyro_elbo.schedules import Capacity, Schedule
from pyro_elbo.terms import Term, WeightOf, data_plate, num_data, scaled_sum

Weight = float | Tensor | Schedule
Beta = Weight | Mapping[str, Weight]
ScheduleValue = Callable[[Schedule], float | Tensor]


@dataclass(frozen=True)
class KLWeighting:
    r"""β of every site and free bits.

    * a number, or a tensor that broadcasts against the site's plates (a β per datum), and time if the site has it
      (shape (T,): a β per step): :math:`\beta\,KL`;
    * a schedule: the β of the current step; :class:`Capacity`: :math:`\gamma\,|KL - C|`;
    * free bits: :math:`\beta \max(\lambda, \overline{KL})`, see :mod:`pyro_elbo.objectives.free_bits`.

    References:
        Higgins et al. (2017), β-VAE, ICLR; Kingma, Salimans et al. (2016),
        arXiv:1606.04934 (free bits); Burgess et al. (2018), arXiv:1804.03599 (capacity).
    """

    beta: Beta = 1.0
    free_bits: float = 0.0
    _schedules: Mapping[str | None, Weight] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        per_site = self.beta if isinstance(self.beta, Mapping) else {None: self.beta}
        for name, weight in per_site.items():
            if name is not None:
                check_name("every key of beta", name)
            _check_weight("beta" if name is None else f"beta['{name}']", weight)
        check_number("free_bits (nats)", self.free_bits)
        if self.free_bits and any(isinstance(w, Capacity) for w in per_site.values()):
            raise ArgumentError("free_bits and pe.Capacity both set a target for the KL: choose one of them.")
        object.__setattr__(self, "_schedules", dict(per_site))

    @property
    def settled(self) -> int:
        """The step from which every weight is constant."""
        return max((w.settled for w in self._schedules.values() if isinstance(w, Schedule)), default=0)

    def is_identity(self) -> bool:
        """Return True where the weighted KL is the KL itself."""
        return self.free_bits == 0 and not isinstance(self.beta, Tensor | Schedule | Mapping) and self.beta == 1

    def at(self, step: int, sites: Iterable[str]) -> dict[str, float]:
        """Return the β of each site at a step, averaged over data (for a Capacity, its target in nats)."""
        check_count("step", step, least=0)
        for name in (sites := _listed(sites)):
            check_name("every one of sites", name)
        weights = {name: self._of(name) for name in sites}
        values = {n: w(step) if isinstance(w, Schedule) else w for n, w in weights.items()}
        return {name: float(torch.as_tensor(w).double().mean()) for name, w in values.items()}

    def is_target(self, name: str) -> bool:
        """Return whether the β of a site is the target of its KL in nats, that of a Capacity."""
        return isinstance(self._of(name), Capacity)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The different schedules among the weights."""
        return tuple(dict.fromkeys(w for w in self._schedules.values() if isinstance(w, Schedule)))

    def __call__(
        self, sites: Mapping[str, Term], particle_dim: int | None, value: ScheduleValue
    ) -> tuple[dict[str, Tensor], float | Tensor]:
        """Return the charge for each KL site, shaped like the term's nats, and a constant.

        Args:
            sites: the terms of the bound.
            particle_dim: the batch dimension of the particles, if any.
            value: gives the value of a schedule at this step.

        Raises:
            ArgumentError: a weight names no KL site, or a tensor does not broadcast against the plates.
        """
        terms = {name: t for name, t in sites.items() if t.is_kl}
        if self.is_identity():
            return {name: t.nats for name, t in terms.items()}, 0.0
        self._check_names(terms)
        gates, constant = self._capacity(sites, particle_dim, value)
        weighted = {}
        for name, term in terms.items():
            weight = gates[name] if name in gates else self._of(name)
            if isinstance(weight, Schedule):
                weight = value(weight)
            elif isinstance(weight, Tensor) and name not in gates:
                _check_broadcast(term.steps or term, weight)
            weighted[name] = self._charge(term, weight, per_step=isinstance(self._of(name), Tensor))
        if self.free_bits and (joint := {name: t for name, t in terms.items() if t.joint}):
            charges, floor = floor_joint(joint, self.free_bits, self._joint_weight(joint, value), particle_dim)
            weighted, constant = weighted | charges, constant + floor
        return weighted, constant

    def of_summed_out(self, sites: Mapping[str, Term], value: ScheduleValue) -> WeightOf | None:
        """Return the weights of the KL, by site, that the posteriors of summed-out sites depend on; None if all are 1.

        Raises:
            ArgumentError: free bits; later, when a weight is asked for, a capacity or a β per step.
        """
        if self.is_identity() or all(t.posterior is None for t in sites.values()):
            return None
        summed = [n for n, t in sites.items() if t.posterior is not None]
        if self.free_bits:
            raise ArgumentError(
                f"free_bits with {summed}, which the model sums out: their posterior is exact and needs no floor. "
                "Leave out free_bits, or draw these sites in the guide."
            )
        if all(not isinstance(w, Tensor | Schedule) and w == 1 for w in map(self._of, sites)):
            return None
        return lambda name: self._weight_in_sum(name, sites, value)

    def _weight_in_sum(self, name: str, sites: Mapping[str, Term], value: ScheduleValue) -> float | Tensor:
        """Return the weight of one site, also of a step ``z_3`` whose loop ``z`` is one term."""
        joined = name if name in sites else name.rpartition("_")[0]
        weight = self._of(joined)
        if isinstance(weight, Capacity):
            raise ArgumentError(
                f"Site '{name}' is summed out, or depends on a site that is: pe.Capacity sets no target for its KL. "
                "Give it another weight, such as beta={...: 1.0}, or draw these sites in the guide."
            )
        if isinstance(weight, Schedule):
            return value(weight)
        if sites[joined].steps is None or not isinstance(weight, Tensor) or not weight.dim():
            return weight
        if weight.shape[-1] > 1:
            raise ArgumentError(
                f"Site '{joined}': its steps are summed out together, at one temperature, so that beta cannot differ "
                "between steps. Give one beta for all of them."
            )
        return weight.squeeze(-1)

    def _joint_weight(self, joint: Mapping[str, Term], value: ScheduleValue) -> float | Tensor:
        """Return the one β of sites that have one KL together."""
        weights = [self._of(name) for name in joint]
        if any(w is not weights[0] and (isinstance(w, Tensor) or w != weights[0]) for w in weights):
            raise ArgumentError(
                f"free_bits with a beta per site: the sites {list(joint)} are drawn together by the guide and have one "
                "KL, so they need one beta. Give all of them the same, or leave out free_bits."
            )
        return value(weights[0]) if isinstance(weights[0], Schedule) else weights[0]

    def _charge(self, term: Term, weight: float | Tensor, per_step: bool) -> Tensor:
        if term.steps is not None and (per_step or self.free_bits):
            return self._charge(term.steps, weight, per_step).sum(-1)
        return (floor_site(term, self.free_bits) if self.free_bits else term.nats) * weight

    def _of(self, name: str) -> Weight:
        return self._schedules.get(name, self._schedules.get(None, 1.0))

    def _capacity(
        self, sites: Mapping[str, Term], particle_dim: int | None, value: ScheduleValue
    ) -> tuple[dict[str, float | Tensor], float | Tensor]:
        """Return γ|KL - C| as a factor ±γ on the KL of each site and a constant, one target per schedule."""
        groups: dict[Capacity, list[str]] = {}
        for name, term in sites.items():
            weight = self._of(name)
            if term.is_kl and isinstance(weight, Capacity):
                groups.setdefault(weight, []).append(name)
        gates, constant, plate = {}, 0.0, data_plate(sites)
        part = (1 if plate is None else plate.size) / num_data(sites)  # of the full data
        for capacity, names in groups.items():
            total = torch.stack([scaled_sum(sites[n], sites[n].nats.detach(), particle_dim) for n in names]).sum()
            target = value(capacity) * num_data(sites)
            sign = torch.sign(ranks.total((total - target) * part)) * capacity.gamma
            gates |= dict.fromkeys(names, sign)
            constant = constant - sign * target
        return gates, constant

    def _check_names(self, terms: Mapping[str, Term]) -> None:
        if None in self._schedules:
            return
        for name in self._schedules:
            if name not in terms:
                raise ArgumentError(f"beta names the site '{name}', but the latent sites are {list(terms)}.")
        for name, term in terms.items():
            if term.kind == "auxiliary" and name not in self._schedules:
                raise ArgumentError(
                    f"beta per site: the guide draws through its auxiliary site '{name}', whose entropy belongs to no "
                    f"single site. Give it a weight as well (beta={{'{name}': ..., ...}}), or use one beta for all."
                )


def _listed(sites: Iterable[str]) -> list[str]:
    if isinstance(sites, str | bytes) or not isinstance(sites, Iterable) or isinstance(sites, type):
        raise ArgumentError(f"sites must be a list of names, got {describe(sites)}.")
    return list(sites)


def _check_weight(what: str, weight: Weight) -> None:
    if isinstance(weight, Schedule):
        return
    if isinstance(weight, Tensor):
        if weight.is_complex() or not weight.numel():
            raise ArgumentError(f"{what} must hold real numbers >= 0, got {describe(weight)}.")
        if not (torch.isfinite(weight) & (weight >= 0)).all():
            raise ArgumentError(f"{what} must be finite and >= 0, got a tensor with NaN, infinity or negative entries.")
        return
    if not isinstance(weight, Real) or isinstance(weight, bool):
        raise ArgumentError(
            f"{what} must be a number, a tensor or a schedule such as pe.LinearWarmup(0.0, 1.0, steps=1000), got "
            f"{describe(weight)}."
        )
    check_number(what, weight)


def _check_broadcast(term: Term, weight: Tensor) -> None:
    sizes = {p.dim: p.size for p in term.plates}
    if any(n not in (1, sizes.get(d - weight.dim(), 1)) for d, n in enumerate(weight.shape)):
        plates = {p.name: p.size for p in term.plates}
        raise ArgumentError(
            f"Site '{term.name}': expected a beta that broadcasts against its plates {plates}, got shape "
            f"{tuple(weight.shape)}."
        )
