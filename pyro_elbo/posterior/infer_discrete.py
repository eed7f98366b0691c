"""The values of the discrete latents that a model sums out: one joint draw, or the most probable joint values."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.errors import ArgumentError, SiteError, describe
from pyro_elbo.posterior.draws import ProgramCall
from pyro_elbo.posterior.summed_out import check_masked, check_possible, draw_summed_out, in_plates
from pyro_elbo.programs import (
    Program,
    Site,
    TracePair,
    check_initialized,
    check_options,
    check_programs,
    evaluating,
    program_arguments,
    seeded,
    trace_pair,
)
from pyro_elbo.terms import Term, evaluate_run, most_probable


def infer_discrete(
    model: Program,
    guide: Program | None = None,
    *args: Any,
    temperature: float = 1,
    seed: int | None = 0,
    **kwargs: Any,
) -> dict[str, Tensor]:
    r"""Return values of the discrete latents that a model sums out, given its data and one draw of the guide's latents.

    .. math:: k \sim p(k \mid x, z) \quad \text{(temperature 1)}, \qquad
        \arg\max_k p(k \mid x, z) \quad \text{(temperature 0)}, \qquad z \sim q(z)

    Both are joint: over all sites, and over all steps of a ``pe.scan`` or of a loop. The most probable path of a state
    is that of the Viterbi algorithm. Its steps need not be the most probable ones of ``terms.posterior``. Of several
    equally probable paths of a scan it is the one whose last state comes first in the support, then the state before,
    and so on. For many draws use :func:`to_arviz`, or ``sample`` of the result of :func:`fit`.

    Args:
        model, guide: the programs. The guide has none of the marked sites.
        args, kwargs: arguments of both programs.
        temperature: 1 for a draw from the exact posterior, 0 for its mode.
        seed: seed of all draws; None continues the caller's random stream.

    Returns:
        By site, values of shape plates × (time of a scan ×) event, as in a run of the model. Steps after the end of a
        sequence, and rows that a mask leaves out, have a draw from the prior at temperature 1, and at 0 the most
        probable values given the others.

    Raises:
        ArgumentError: another temperature, no guide, or an option is misspelled.
        SiteError: the model sums no site out, or the guide enumerates one; as from the terms.
        NonFiniteError: no values can have the data.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     def step(k, x_t):
        ...         stay = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        ...         k = pyro.sample("k", dist.Categorical(stay[k]), infer={"enumerate": "parallel"})
        ...         pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x_t)
        ...         return k, None
        ...     pe.scan(step, torch.tensor(0), x)
        >>> x = torch.tensor([0.1, -0.3, 1.2, 0.4, 2.2, 1.7, 1.8])
        >>> pe.infer_discrete(model, lambda x: None, x, temperature=0)["k"]
        tensor([0, 0, 0, 0, 1, 1, 1])

    References:
        Viterbi (1967), Error bounds for convolutional codes and an asymptotically optimum decoding algorithm;
        Obermeyer, Bingham, Jankowiak, Chiu, Pradhan, Rush, Goodman (2019), Tensor variable elimination for plated
        factor graphs, arXiv:1902.03210.
    """
    if not isinstance(temperature, Real) or temperature not in (0, 1):
        raise ArgumentError(f"temperature must be 0 (the mode) or 1 (a draw), got {describe(temperature)}.")
    if guide is None:
        raise ArgumentError(
            "pe.infer_discrete returns values at once: expected the guide and the data after the model, as in "
            "pe.infer_discrete(model, guide, x, temperature=0), without first_available_dim. A model without other "
            "latents has the guide lambda x: None."
        )
    check_options(model, kwargs)
    check_programs(model, guide)
    check_initialized(guide)
    programs = ProgramCall(model, guide, *program_arguments(model, args, kwargs))
    with torch.no_grad(), seeded(seed), evaluating(model, guide):
        run = trace_pair(*programs)
        if marked := [n for n, s in run.guide.items() if s.is_enumerated]:
            raise SiteError(
                f"The guide enumerates {marked}, where values are asked for given one draw of the guide. Use "
                "terms.posterior, which is the guide's. Give the marks to these sites of the model for its own "
                "posterior, and leave them out of the guide."
            )
        if not run.summed_out:
            raise SiteError(
                "The model sums no site out. Mark its discrete sites, infer={'enumerate': 'parallel'} or "
                "pyro.infer.config_enumerate(model), and leave them out of the guide."
            )
        terms = evaluate_run(run, "sampled")
        check_possible(run, terms)
        if temperature == 0:
            return _mode(run, terms)
        drawn = trace_pair(*programs._replace(guide=draw_summed_out(model, guide))).model
        return {n: drawn[n].value for n in run.summed_out}


def _mode(run: TracePair, terms: Mapping[str, Term]) -> dict[str, Tensor]:
    """Return the most probable joint values of the sites that are summed out."""
    best, found = most_probable(run), {}
    for name in run.summed_out:
        site, term = run.model[name], terms[name]
        check_masked(site, term)
        steps = 0 if term.steps is None else 1
        found[name] = _support(site)[in_plates(run, site, best[name], 1 + steps).argmax(-1)]
    return found


def _support(site: Site) -> Tensor:
    """Return the values of a site that has all of them along one dimension: shape K × event of one step."""
    steps = site.stepwise()
    batch = steps.value.dim() - steps.event_dim
    assert site.enum_dim is not None
    own = batch + site.enum_dim - (len(steps.plates) - len(site.plates))
    return steps.value.movedim(own, 0)[(slice(None), *(0,) * (batch - 1))]
