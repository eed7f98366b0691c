"""Why does a shop that could charge any price charge only a few?

A seller's unit cost moves between 1 and 3 dollars, and the best price moves with it. Looking at the cost takes
attention, which costs λ dollars a nat. How often does the seller charge each of seven prices, and which of them never?
This is the problem of Matějka (2016), Rationally inattentive seller: sales and discrete pricing.

Nine sellers, each with a λ of its own, are trained at once by ``pe.SVI``: λ is the β of the bound. The script prints
profit, information and the prices in use, and compares the choice probabilities with those of Blahut and Arimoto. Run
with ``python -m examples.rational_inattention``; files go to ``runs/rational_inattention/``. ``--data FILE.npz`` brings
another decision: arrays ``utility`` (states × actions), ``prior`` (states) and ``costs`` (values of λ).
"""

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

import pyro_elbo as pe
from models.rational_inattention import Decision, RationalInattention, blahut_arimoto

COSTS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.3)
USED = 1e-4  # an action that is chosen less often has dropped out


class Problem(NamedTuple):
    """A decision, the λ of each agent, and the label of each action and state."""

    decision: Decision
    costs: Float[Tensor, " agents"]
    actions: list[str]
    states: list[str]


def seller(costs: tuple[float, ...] = COSTS) -> Problem:
    """Return the seller's decision: profit (price - cost) · demand, where 5 - price units are sold."""
    cost, price = torch.linspace(1.0, 3.0, 11).double(), torch.linspace(2.9, 4.1, 7).double()
    profit = (price - cost[:, None]) * (5 - price)
    decision = Decision(profit, torch.full((11,), 1 / 11).double())
    labels = [[f"${x:.2f}" for x in values] for values in (price, cost)]
    return Problem(decision, torch.tensor(costs).double(), *labels)


def load(path: Path) -> Problem:
    """Read a decision from a file."""
    with np.load(path, allow_pickle=False) as data:
        utility, prior, costs = (torch.tensor(data[name]).double() for name in ("utility", "prior", "costs"))
    states, actions = ([str(i) for i in range(n)] for n in utility.shape)
    return Problem(Decision(utility, prior), costs, actions, states)


def train(problem: Problem, loss: pe.TraceBeta_ELBO, steps: int) -> RationalInattention:
    """Maximize the exact objective, with a learning rate that falls to a five-hundredth of its start."""
    pyro.clear_param_store()
    agents = RationalInattention(problem.decision, len(problem.costs))
    optimizer = pyro.optim.ClippedAdam({"lr": 0.3, "betas": (0.9, 0.9), "lrd": 0.002 ** (1 / steps)})
    pe.SVI(agents.model, agents.guide, optimizer, loss).run(steps, progress=False)
    return agents


def draw(problem: Problem, choice: Tensor, exact: Tensor, path: Path) -> None:
    """Plot what each agent chooses, in which state, and what its information is worth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    decision, costs = problem.decision, problem.costs
    draw_marginals(axes[0], problem, choice, exact)

    shown = len(costs) // 2
    image = axes[1].imshow(choice[shown].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes[1].set_xticks(range(len(problem.actions)), problem.actions, rotation=45)
    axes[1].set_yticks(range(len(problem.states)), problem.states)
    axes[1].set(
        title=f"choice in each state, λ = {costs[shown]:g}", xlabel="action (price)", ylabel="state (unit cost)"
    )
    figure.colorbar(image, label="q(a | s)")

    between = torch.logspace(costs.min().log10(), costs.max().log10(), 60).double()
    curve = blahut_arimoto(decision, between, tolerance=1e-8)
    axes[2].plot(decision.information(curve), decision.expected_utility(curve), color="0.6", label="Blahut-Arimoto")
    axes[2].plot(decision.information(choice), decision.expected_utility(choice), "o", color="C0", label="learned")
    for cost, x, y in zip(costs, decision.information(choice), decision.expected_utility(choice), strict=True):
        if x > 1e-3:
            axes[2].annotate(f"λ = {cost:g}", (x, y), xytext=(6, -10), textcoords="offset points", fontsize=8)
    axes[2].set(title="what information is worth", xlabel="I(s; a), nats", ylabel="expected utility (profit, $)")
    axes[2].margins(x=0.15)
    axes[2].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_marginals(ax: "matplotlib.axes.Axes", problem: Problem, choice: Tensor, exact: Tensor) -> None:
    """Stack the probabilities of the actions for each agent; ticks mark the exact ones."""
    import matplotlib.pyplot as plt

    learned, known = (torch.einsum("s,nsa->na", problem.decision.prior, q) for q in (choice, exact))
    positions, colors = np.arange(len(learned)), plt.get_cmap("viridis")(np.linspace(0, 0.95, learned.shape[1]))
    for action, color in enumerate(colors):
        ax.bar(positions, learned[:, action], bottom=learned[:, :action].sum(1), color=color)
    for action, label in enumerate(problem.actions):
        ax.plot([], [], "s", color=colors[action], label=label)
        ax.plot(positions, known[:, : action + 1].sum(1), "_", color="red", markersize=14)
    ax.plot([], [], "_", color="red", label="exact")
    ax.set_xticks(positions, [f"{cost:g}" for cost in problem.costs], rotation=45)
    ax.set(title="how often each action is chosen", xlabel="λ, utility per nat", ylabel="p(a)", ylim=(0, 1.02))
    ax.legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    problem = load(data) if data is not None else seller(COSTS[::4] if smoke_test else COSTS)
    loss = pe.TraceBeta_ELBO(beta=problem.costs[:, None])
    agents = train(problem, loss, steps=600 if smoke_test else 1500)

    terms = loss.terms(agents.model, agents.guide)
    prior = problem.decision.prior
    utility, information = (x.detach() @ prior for x in (terms.log_likelihood["utility"], terms.kl["action"]))
    exact, choice = blahut_arimoto(problem.decision, problem.costs), agents.choice
    error = (choice - exact).abs().amax((1, 2))
    used = torch.einsum("s,nsa->na", prior, choice) > USED
    print(f"{'λ':>6}{'utility':>10}{'I, nats':>10}{'error':>10}   actions in use")
    for i, cost in enumerate(problem.costs):
        names = ", ".join(name for name, kept in zip(problem.actions, used[i], strict=True) if kept)
        print(f"{cost:6g}{utility[i]:10.4f}{information[i]:10.4f}{error[i]:10.1e}   {names}")

    out.mkdir(parents=True, exist_ok=True)
    coords = {"agents": problem.costs.tolist(), "states": problem.states, "options": problem.actions}
    options = {"num_samples": 100, "dims": {"action": ["options"]}, "coords": coords, "seed": seed}
    posterior = pe.to_arviz(agents.model, agents.drawing_guide, **options)
    posterior.to_netcdf(str(out / "posterior.nc"))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(problem, choice, exact, out / "rational_inattention.png")
    print(f"\nwritten to {out}/: posterior.nc (ArviZ; draws of actions), rational_inattention.png")

    assert error.max() < 1e-4, f"choice probabilities must equal the exact ones to 1e-4, error {error.max():.1e}"
    off = (information - problem.decision.information(choice)).abs().max()
    assert off < 1e-4, f"the rate must be the information, but is off by {off:.1e} nats"
    kept = used.sum(1).tolist()
    print(
        f"claim: {len(kept)} values of λ, choice probabilities within {error.max():.1e} of Blahut-Arimoto's (bound "
        f"1e-4); from {max(kept)} to {min(kept)} actions in use"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a decision: arrays utility, prior and costs")
    parser.add_argument("--out", type=Path, default=Path("runs/rational_inattention"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="three λ and few steps")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
