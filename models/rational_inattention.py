"""Rational inattention: an agent chooses among actions and pays λ for each nat that it learns about the state.

    maximize  E[u(s, a)] - λ I(s; a)  over q(a | s),     s ~ μ known

I(s; a) = min_p Σ_s μ(s) KL(q(a | s) ‖ p(a)), so that this is an ELBO: q(a | s) is the guide, p(a) the model, λ is β,
the utility takes the place of the log-likelihood, and the rate is the information in nats. The optimum is
q(a | s) ∝ p(a) exp(u(s, a) / λ), where p drops actions as λ grows; the iteration of Blahut and Arimoto finds it.

A one-hot action enters the utility linearly, so that its mean under q gives the expected utility. The guide answers
with the mean: neither the objective nor its gradient has any noise.
Sims (2003), Implications of rational inattention; Matějka, McKay (2015), Rational inattention to discrete choices: a
new foundation for the multinomial logit model; Blahut (1972), Computation of channel capacity and rate-distortion
functions; Arimoto (1972), An algorithm for computing the capacity of arbitrary discrete memoryless channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

Choice = Float[Tensor, "agents states actions"]
PerAgent = Float[Tensor, " agents"]


@dataclass(frozen=True)
class Decision:
    """What an agent faces.

    Attributes:
        utility: u(s, a), shape (states, actions).
        prior: μ(s) > 0, shape (states,); adds up to 1.
    """

    utility: Float[Tensor, "states actions"]
    prior: Float[Tensor, " states"]

    def __post_init__(self) -> None:
        states, total = len(self.utility), self.prior.sum().item()
        if len(self.prior) != states or not (self.prior > 0).all() or abs(total - 1) > 1e-6:
            raise ValueError(
                f"prior: expected {states} positive probabilities that add up to 1, one per row of utility, got "
                f"{len(self.prior)} numbers that add up to {total:g}. Leave out states that never occur, and divide "
                "by the sum."
            )

    def expected_utility(self, choice: Choice) -> PerAgent:
        """Return E[u(s, a)] of each agent."""
        return torch.einsum("s,nsa,sa->n", self.prior, choice, self.utility)

    def information(self, choice: Choice) -> PerAgent:
        """Return I(s; a) = H(a) - H(a | s) of each agent in nats."""
        marginal = torch.einsum("s,nsa->na", self.prior, choice)
        return torch.special.entr(marginal).sum(-1) - torch.special.entr(choice).sum(-1) @ self.prior


class MeanAction(dist.OneHotCategorical):
    """A law of one-hot actions that answers with its mean in place of a draw, with the gradient of the mean."""

    has_rsample = True

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008  (as torch declares it)
        return self.probs.expand(self._extended_shape(sample_shape))


class RationalInattention(nn.Module):
    """Agents that face one decision: ``model()`` and ``guide()``, whose latent ``action`` is one-hot.

    Plates are ``agents`` and ``states``. States are scaled by their prior, so that the terms of the bound are
    expectations. Give every agent its λ by ``pe.TraceBeta_ELBO(beta=costs[:, None])``.

    Args:
        decision: utilities and prior.
        agents: how many.
    """

    def __init__(self, decision: Decision, agents: int) -> None:
        super().__init__()
        self.decision = decision
        zeros = decision.utility.new_zeros(agents, *decision.utility.shape)
        self.habit = nn.Parameter(zeros[:, :1].clone())  # logits of p(a)
        self.response = nn.Parameter(zeros)  # logits of q(a | s)

    def model(self) -> None:
        with self._agents_in_states():
            action = pyro.sample("action", dist.OneHotCategorical(logits=self.habit))
            pyro.factor("utility", (action * self.decision.utility).sum(-1))

    def guide(self) -> Choice:
        with self._agents_in_states():
            return pyro.sample("action", MeanAction(logits=self.response))

    def drawing_guide(self) -> Choice:
        """Draw actions by the same q(a | s)."""
        with self._agents_in_states():
            return pyro.sample("action", dist.OneHotCategorical(logits=self.response))

    @property
    def choice(self) -> Choice:
        """The probabilities q(a | s)."""
        return self.response.detach().softmax(-1)

    @contextmanager
    def _agents_in_states(self) -> Iterator[None]:
        pyro.module("rational_inattention", self)
        agents, states, _ = self.response.shape
        prior = pyro.poutine.scale(scale=self.decision.prior)
        with pyro.plate("agents", agents, dim=-2), pyro.plate("states", states, dim=-1), prior:
            yield


@torch.no_grad()
def blahut_arimoto(
    decision: Decision, costs: PerAgent, tolerance: float = 1e-12, max_iterations: int = 200_000
) -> Choice:
    """Return the optimal q(a | s) of an agent for each λ.

    With c(a) = Σ_s μ(s) exp(u(s, a) / λ) / Σ_b p(b) exp(u(s, b) / λ) the iteration is p(a) ← p(a) c(a). At p the
    objective lies at most λ log max c below its optimum.

    Args:
        costs: λ > 0, utility per nat.
        tolerance: for log max c, in nats.

    Raises:
        ValueError: an iteration did not come that close.
    """
    utility = decision.utility - decision.utility.amax(-1, keepdim=True)
    gain = (utility / costs[:, None, None]).exp()
    p = torch.full_like(gain[:, 0], 1 / gain.shape[-1])
    for _ in range(max_iterations):
        c = torch.einsum("s,nsa->na", decision.prior, gain / (gain @ p[..., None]))
        if (gap := c.log().max()) < tolerance:
            weight = p[:, None] * gain
            return weight / weight.sum(-1, keepdim=True)
        p = p * c
    raise ValueError(
        f"blahut_arimoto: after {max_iterations} iterations log max c is {gap:.2g} nats, expected below "
        f"{tolerance:g}. Raise max_iterations, or move λ away from where an action drops out."
    )
