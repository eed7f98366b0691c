"""What is built into the labeled runs of ``bench_diagnosis``: programs, sizes and recipes, by mistake.

``TABLE`` belongs to the sets on which the rules were made, ``THIRD``, ``FOURTH`` and ``FIFTH`` to one set each.
"""

from typing import Any, NamedTuple


class Construction(NamedTuple):
    """A mistake: its name, the programs, how they are made and trained, and what differs in the final half."""

    label: str
    family: str
    sizes: dict[str, Any]
    recipe: dict[str, Any]
    final: dict[str, Any]


MEMORY = {"batch": 50, "epochs": 120, "lr": 1e-2, "decay": 0.2}
FEW_ROWS = {"batch": 30, "epochs": 160, "decay": 0.2}
FEW = {"batch": 4, "epochs": 20, "lr": 3e-2, "decay": 1.0}
FRAMES = {"lr": 3e-2, "batch": 50, "epochs": 30}
SETTLED = {"lr": 1e-2, "batch": 200, "epochs": 100}
TABLE = [
    # --- healthy: enough rows, a step size that ends small
    Construction("healthy", "vae", {}, SETTLED, {"epochs": 90}),
    Construction("healthy", "vae", {"source": "fashion"}, SETTLED, {"epochs": 90}),
    Construction("healthy", "vae", {"told": "class", "z_dim": 3}, SETTLED, {"epochs": 90}),
    Construction("healthy", "vae", {"scale": 0.3}, SETTLED, {"z_dim": 3}),
    Construction("healthy", "factors", {}, {}, {"strength": 0.5}),
    Construction("healthy", "regression", {}, {"lr": 0.05, "epochs": 300, "batch": None}, {"rows": 320}),
    Construction("healthy", "vrnn", {"source": "patterns", "markov": True}, FRAMES, {"hidden": 20}),
    Construction("healthy", "vrnn", {"source": "patterns", "markov": True, "z_dim": 4}, FRAMES, {"hidden": 20}),
    # --- not converged: small or few steps
    Construction("not converged", "vae", {}, {"lr": 2e-4, "epochs": 15, "decay": 1.0}, {"lr": 3e-4}),
    Construction("not converged", "vae", {"told": "class"}, {"lr": 1e-3, "epochs": 8, "decay": 1.0}, {"epochs": 9}),
    Construction(
        "not converged", "regression", {}, {"lr": 5e-3, "epochs": 60, "batch": None, "decay": 1.0}, {"lr": 4e-3}
    ),
    Construction(
        "not converged", "vrnn", {"markov": True}, {"lr": 1e-3, "epochs": 8, "decay": 1.0}, {"source": "chorales"}
    ),
    # --- posterior collapse: nothing to say, or a decoder that needs nothing said
    Construction("posterior collapse", "vae", {"scale": 3.0}, {}, {"scale": 2.5}),
    Construction("posterior collapse", "vae", {"source": "coins"}, {}, {"z_dim": 6}),
    Construction("posterior collapse", "vae", {"told": "copy", "hidden": 64, "scale": 0.5}, {}, {"hidden": 96}),
    Construction("posterior collapse", "vrnn", {}, {"epochs": 20, "lr": 2e-2}, {"source": "coins"}),
    # --- over-regularized: a weight of the KL beyond what the data pay
    Construction("over-regularized", "vae", {}, {"beta": 40.0}, {"beta": 60.0}),
    Construction("over-regularized", "vae", {"told": "class"}, {"beta": 20.0}, {"beta": 30.0}),
    Construction(
        "over-regularized", "regression", {}, {"beta": 30.0, "lr": 0.05, "epochs": 300, "batch": None}, {"beta": 50.0}
    ),
    Construction(
        "over-regularized", "vrnn", {"markov": True}, {"beta": 10.0, "epochs": 20, "lr": 2e-2}, {"beta": 15.0}
    ),
    # --- overfitting: few rows, many parameters
    Construction(
        "overfitting",
        "vae",
        {"rows": 80, "hidden": 256, "z_dim": 8},
        {"batch": 40, "epochs": 150, "decay": 0.2},
        {"rows": 100},
    ),
    Construction(
        "overfitting",
        "vae",
        {"rows": 100, "hidden": 256, "told": "class"},
        {"batch": 50, "epochs": 150, "decay": 0.2},
        {"rows": 80},
    ),
    Construction(
        "overfitting",
        "vae",
        {"rows": 80, "hidden": 256, "scale": 0.1, "z_dim": 8},
        {"batch": 40, "epochs": 150, "decay": 0.2},
        {"rows": 100},
    ),
    Construction(
        "overfitting",
        "vae",
        {"rows": 80, "hidden": 256, "source": "fashion"},
        {"batch": 40, "epochs": 150, "decay": 0.2},
        {"rows": 100},
    ),
    # --- KL shrinkage: few rows, and a prior that learns them by heart from columns of noise
    Construction("KL shrinkage", "factors", {"rows": 60, "noise": 30}, MEMORY, {"rows": 80}),
    Construction("KL shrinkage", "factors", {"rows": 100, "noise": 40, "z_dim": 5}, MEMORY, {"noise": 30}),
    Construction("KL shrinkage", "vae", {"rows": 300, "told": "noise", "hidden": 16}, MEMORY, {"rows": 250}),
    Construction(
        "KL shrinkage", "vae", {"rows": 300, "told": "noise", "source": "fashion", "hidden": 16}, MEMORY, {"rows": 250}
    ),
    # --- a warm-up that lasts until the last step
    Construction("warm-up too long", "vae", {}, {"beta": "warm-up"}, {"lr": 4e-3}),
    Construction("warm-up too long", "vae", {"told": "class"}, {"beta": "warm-up"}, {"epochs": 30}),
    Construction(
        "warm-up too long",
        "regression",
        {},
        {"beta": "warm-up", "lr": 0.05, "epochs": 200, "batch": None},
        {"epochs": 150},
    ),
    Construction(
        "warm-up too long", "vrnn", {"markov": True}, {"beta": "warm-up", "epochs": 12, "lr": 1e-2}, {"z_dim": 2}
    ),
    # --- diverging: a step size that grows beyond what the bound bears
    Construction("diverging", "vae", {}, {"decay": 300.0}, {"decay": 500.0}),
    Construction("diverging", "vae", {"told": "class"}, {"decay": 500.0}, {"decay": 300.0}),
    Construction(
        "diverging", "regression", {}, {"lr": 0.05, "epochs": 200, "batch": None, "decay": 100.0}, {"decay": 80.0}
    ),
    Construction("diverging", "vrnn", {"markov": True}, {"lr": 1e-2, "epochs": 20, "decay": 300.0}, {"decay": 500.0}),
    # --- dead decoder: the latents are paid for, and the decoder does not hear them
    Construction("dead decoder", "vae", {"deaf": True}, {"free_bits": 1.0}, {"free_bits": 0.5}),
    Construction("dead decoder", "vae", {"deaf": True, "fixed_scale": 0.3}, {}, {"fixed_scale": 0.2}),
    Construction("dead decoder", "vae", {"deaf": True, "told": "class"}, {"capacity": 5.0}, {"capacity": 8.0}),
    Construction(
        "dead decoder", "vrnn", {"deaf": True}, {"free_bits": 0.3, "epochs": 12, "lr": 1e-2}, {"free_bits": 0.5}
    ),
    # --- exploding KL: the rate grows far beyond what it saves
    Construction("exploding KL", "vae", {"z_dim": 8}, {"beta": 1e-3, "decay": 1.0}, {"beta": 5e-4}),
    Construction("exploding KL", "vae", {"told": "class"}, {"beta": 1e-3, "decay": 1.0}, {"beta": 5e-4}),
    Construction("exploding KL", "vae", {}, {"capacity": 200.0, "decay": 1.0}, {"capacity": 300.0}),
    Construction(
        "exploding KL", "vrnn", {"markov": True}, {"beta": 1e-3, "epochs": 25, "lr": 2e-2, "decay": 1.0}, {"beta": 5e-4}
    ),
    # --- noisy objective: gradients of a score function, or of single rows at a large step
    Construction("noisy objective", "vae", {"discrete": True, "z_dim": 30, "rows": 100}, FEW, {"z_dim": 40}),
    Construction(
        "noisy objective", "vae", {"discrete": True, "told": "class", "z_dim": 20, "rows": 100}, FEW, {"z_dim": 30}
    ),
    Construction("noisy objective", "regression", {"rows": 200}, {**FEW, "lr": 0.3, "epochs": 12}, {"lr": 0.4}),
    Construction("noisy objective", "vae", {"rows": 100}, {**FEW, "batch": 2, "epochs": 12}, {"lr": 4e-2}),
]


LINES = {"lr": 0.04, "epochs": 350, "batch": None}
SHORT = {"epochs": 12, "decay": 1.0}
THIRD = [
    Construction("healthy", "vae", {"hidden": 48}, {**SETTLED, "batch": 150, "epochs": 90}, {}),
    Construction("healthy", "vae", {"source": "fashion", "z_dim": 3}, {**SETTLED, "batch": 150}, {}),
    Construction("healthy", "vae", {"told": "class", "hidden": 48}, SETTLED, {}),
    Construction("healthy", "vae", {"scale": 0.4, "z_dim": 5}, SETTLED, {}),
    Construction("healthy", "vae", {"source": "fashion", "told": "class", "scale": 0.3}, SETTLED, {}),
    Construction("healthy", "factors", {"x_dim": 40, "z_dim": 2, "strength": 0.6}, {"epochs": 50}, {}),
    Construction("healthy", "regression", {"groups": 6, "rows": 300}, LINES, {}),
    Construction("healthy", "vae", {"z_dim": 6}, {**SETTLED, "beta": "warm-up", "rises": 0.3}, {}),
    Construction(
        "healthy",
        "vrnn",
        {"source": "patterns", "markov": True, "hidden": 24},
        {**FRAMES, "epochs": 60, "beta": "warm-up", "rises": 0.25},
        {},
    ),
    Construction("not converged", "vae", {"source": "fashion"}, {"lr": 3e-4, "epochs": 12, "decay": 1.0}, {}),
    Construction("not converged", "vae", {"scale": 0.3}, {"lr": 5e-4, "epochs": 10, "decay": 1.0}, {}),
    Construction("not converged", "regression", {"groups": 6}, {**LINES, "lr": 6e-3, "epochs": 50, "decay": 1.0}, {}),
    Construction(
        "not converged", "vrnn", {"markov": True, "hidden": 24}, {"lr": 1.5e-3, "epochs": 8, "decay": 1.0}, {}
    ),
    Construction("posterior collapse", "vae", {"source": "fashion", "scale": 4.0}, {}, {}),
    Construction("posterior collapse", "vae", {"source": "coins", "z_dim": 3, "hidden": 48}, {}, {}),
    Construction(
        "posterior collapse", "vae", {"source": "fashion", "told": "copy", "hidden": 64, "scale": 0.6}, {}, {}
    ),
    Construction("posterior collapse", "vrnn", {"hidden": 20}, {"epochs": 24, "lr": 1.5e-2}, {}),
    Construction("over-regularized", "vae", {"source": "fashion"}, {"beta": 50.0}, {}),
    Construction("over-regularized", "vae", {"told": "class", "z_dim": 6}, {"beta": 25.0}, {}),
    Construction("over-regularized", "regression", {"groups": 6}, {**LINES, "beta": 40.0}, {}),
    Construction(
        "over-regularized", "vrnn", {"markov": True, "z_dim": 2}, {"beta": 12.0, "epochs": 20, "lr": 2e-2}, {}
    ),
    Construction("overfitting", "vae", {"rows": 60, "hidden": 256, "z_dim": 6}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 90, "hidden": 384, "told": "class"}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 70, "hidden": 256, "scale": 0.15, "z_dim": 6}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 90, "hidden": 256, "source": "fashion", "z_dim": 6}, FEW_ROWS, {}),
    Construction("KL shrinkage", "factors", {"rows": 70, "noise": 35}, MEMORY, {}),
    Construction("KL shrinkage", "factors", {"rows": 80, "noise": 40, "z_dim": 4}, MEMORY, {}),
    Construction("KL shrinkage", "vae", {"rows": 280, "told": "noise", "hidden": 16}, MEMORY, {}),
    Construction("KL shrinkage", "vae", {"rows": 260, "told": "noise", "source": "fashion", "hidden": 12}, MEMORY, {}),
    Construction("warm-up too long", "vae", {"source": "fashion"}, {"beta": "warm-up"}, {}),
    Construction("warm-up too long", "vae", {"told": "class", "z_dim": 3}, {"beta": "warm-up", "epochs": 30}, {}),
    Construction("warm-up too long", "regression", {"groups": 6}, {**LINES, "epochs": 180, "beta": "warm-up"}, {}),
    Construction(
        "warm-up too long", "vrnn", {"markov": True, "hidden": 20}, {"beta": "warm-up", "epochs": 14, "lr": 1e-2}, {}
    ),
    Construction("diverging", "vae", {"source": "fashion"}, {"decay": 400.0}, {}),
    Construction("diverging", "vae", {"scale": 0.3}, {"decay": 400.0}, {}),
    Construction("diverging", "regression", {"groups": 6}, {**LINES, "lr": 0.05, "epochs": 220, "decay": 90.0}, {}),
    Construction("diverging", "vrnn", {"markov": True, "hidden": 20}, {"lr": 1e-2, "epochs": 22, "decay": 400.0}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "source": "fashion"}, {"free_bits": 0.7}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "fixed_scale": 0.25, "z_dim": 3}, {}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "told": "class", "source": "fashion"}, {"capacity": 6.0}, {}),
    Construction("dead decoder", "vrnn", {"deaf": True, "z_dim": 2}, {"free_bits": 0.4, "epochs": 14, "lr": 1e-2}, {}),
    Construction("exploding KL", "vae", {"z_dim": 6, "source": "fashion"}, {"beta": 8e-4, "decay": 1.0}, {}),
    Construction("exploding KL", "vae", {"z_dim": 5, "told": "class"}, {"beta": 8e-4, "decay": 1.0}, {}),
    Construction("exploding KL", "vae", {"source": "fashion"}, {"capacity": 250.0, "decay": 1.0}, {}),
    Construction(
        "exploding KL",
        "vrnn",
        {"markov": True, "hidden": 20},
        {"beta": 8e-4, "epochs": 25, "lr": 2e-2, "decay": 1.0},
        {},
    ),
    Construction("noisy objective", "vae", {"discrete": True, "z_dim": 25, "rows": 110}, FEW, {}),
    Construction(
        "noisy objective",
        "vae",
        {"discrete": True, "told": "class", "z_dim": 25, "rows": 110, "source": "fashion"},
        FEW,
        {},
    ),
    Construction("noisy objective", "regression", {"groups": 6, "rows": 150}, {**FEW, "lr": 0.35, "epochs": 12}, {}),
    Construction(
        "noisy objective", "vae", {"rows": 90, "source": "fashion"}, {**FEW, "batch": 2, "epochs": 14, "lr": 3.5e-2}, {}
    ),
]


FOURTH = [
    Construction("healthy", "vae", {"hidden": 64, "z_dim": 3}, {"lr": 8e-3, "batch": 100, "epochs": 80}, {}),
    Construction("healthy", "vae", {"source": "fashion", "hidden": 40, "z_dim": 5}, {**SETTLED, "batch": 150}, {}),
    Construction("healthy", "vae", {"told": "class", "z_dim": 2, "hidden": 40}, {**SETTLED, "epochs": 110}, {}),
    Construction("healthy", "vae", {"scale": 0.25}, {**SETTLED, "epochs": 120}, {}),
    Construction("healthy", "vae", {"source": "fashion", "scale": 0.35, "z_dim": 3}, SETTLED, {}),
    Construction("healthy", "vae", {"source": "fashion", "told": "class"}, {**SETTLED, "epochs": 110}, {}),
    Construction("healthy", "vae", {}, {**SETTLED, "beta": "warm-up", "rises": 0.2}, {}),
    Construction("healthy", "vae", {"told": "class", "z_dim": 3}, {**SETTLED, "beta": "warm-up", "rises": 0.4}, {}),
    Construction("healthy", "factors", {"x_dim": 50, "z_dim": 4, "strength": 0.5}, {"epochs": 50}, {}),
    Construction("healthy", "factors", {"x_dim": 30, "z_dim": 2}, {"lr": 3e-3, "epochs": 60, "decay": 1.0}, {}),
    Construction("healthy", "regression", {"groups": 5, "rows": 400}, LINES, {}),
    Construction("healthy", "regression", {"groups": 10}, {"lr": 0.03, "epochs": 500, "batch": None, "decay": 1.0}, {}),
    Construction("healthy", "vrnn", {"source": "patterns", "markov": True}, {**FRAMES, "epochs": 60}, {}),
    Construction(
        "healthy",
        "vrnn",
        {"source": "patterns", "markov": True, "z_dim": 4, "hidden": 24},
        {**FRAMES, "epochs": 70, "beta": "warm-up", "rises": 0.3},
        {},
    ),
    Construction("not converged", "vae", {"hidden": 48}, {"lr": 4e-4, "epochs": 14, "decay": 1.0}, {}),
    Construction("not converged", "regression", {"groups": 5}, {**LINES, "lr": 7e-3, "epochs": 60, "decay": 1.0}, {}),
    Construction("not converged", "factors", {"z_dim": 4}, {"lr": 3e-4, "epochs": 16, "decay": 1.0}, {}),
    Construction("posterior collapse", "vae", {"source": "fashion", "scale": 5.0, "z_dim": 3}, {}, {}),
    Construction("posterior collapse", "vae", {"source": "coins", "z_dim": 5}, {"epochs": 50}, {}),
    Construction("posterior collapse", "vae", {"told": "copy", "hidden": 80, "scale": 0.6}, {}, {}),
    Construction("over-regularized", "vae", {"source": "fashion", "z_dim": 6}, {"beta": 70.0}, {}),
    Construction("over-regularized", "vae", {"told": "class", "z_dim": 5}, {"beta": 30.0}, {}),
    Construction("over-regularized", "regression", {"groups": 10}, {**LINES, "beta": 45.0}, {}),
    Construction("overfitting", "vae", {"rows": 75, "hidden": 320, "z_dim": 6}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 85, "hidden": 256, "told": "class", "z_dim": 6}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 75, "hidden": 320, "scale": 0.12, "z_dim": 8}, FEW_ROWS, {}),
    Construction("KL shrinkage", "factors", {"rows": 75, "noise": 40}, MEMORY, {}),
    Construction("KL shrinkage", "factors", {"rows": 90, "noise": 45, "z_dim": 4}, MEMORY, {}),
    Construction("KL shrinkage", "vae", {"rows": 270, "told": "noise", "hidden": 14}, MEMORY, {}),
    Construction("warm-up too long", "vae", {"scale": 0.3}, {"beta": "warm-up"}, {}),
    Construction("warm-up too long", "factors", {}, {"beta": "warm-up", "epochs": 30}, {}),
    Construction("diverging", "vae", {"hidden": 48}, {"decay": 450.0}, {}),
    Construction("diverging", "regression", {"groups": 10}, {**LINES, "lr": 0.05, "epochs": 200, "decay": 100.0}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "z_dim": 3}, {"free_bits": 0.8}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "fixed_scale": 0.2, "source": "fashion"}, {}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "told": "class", "z_dim": 3}, {"capacity": 7.0}, {}),
    Construction("exploding KL", "vae", {"z_dim": 7}, {"beta": 7e-4, "decay": 1.0}, {}),
    Construction("exploding KL", "vae", {"told": "class", "z_dim": 6}, {"beta": 6e-4, "decay": 1.0}, {}),
    Construction("noisy objective", "vae", {"discrete": True, "z_dim": 35, "rows": 100}, FEW, {}),
    Construction("noisy objective", "regression", {"groups": 10}, {**FEW, "lr": 0.35, "epochs": 12}, {}),
]


FIFTH = [
    Construction("healthy", "vae", {"hidden": 40, "z_dim": 5}, {**SETTLED, "batch": 100, "epochs": 90}, {}),
    Construction("healthy", "vae", {"source": "fashion", "hidden": 48}, {**SETTLED, "epochs": 140}, {}),
    Construction("healthy", "vae", {"told": "class", "z_dim": 4}, {**SETTLED, "lr": 8e-3, "epochs": 120}, {}),
    Construction("healthy", "vae", {"scale": 0.35, "z_dim": 3}, {**SETTLED, "epochs": 110}, {}),
    Construction("healthy", "vae", {"source": "fashion", "scale": 0.4, "told": "class"}, SETTLED, {}),
    Construction("healthy", "vae", {"z_dim": 3}, {**SETTLED, "beta": "warm-up", "rises": 0.25, "epochs": 110}, {}),
    Construction("healthy", "vae", {"scale": 0.3}, {**SETTLED, "batch": 100, "beta": "warm-up", "rises": 0.3}, {}),
    Construction("healthy", "factors", {"x_dim": 45, "z_dim": 3, "strength": 0.5}, {"epochs": 45}, {}),
    Construction("healthy", "factors", {"x_dim": 70, "z_dim": 5}, {"epochs": 60, "batch": 150}, {}),
    Construction("healthy", "regression", {"groups": 7, "rows": 350}, LINES, {}),
    Construction("healthy", "regression", {"groups": 4}, {**LINES, "batch": 60, "epochs": 150, "lr": 0.02}, {}),
    Construction("healthy", "vrnn", {"source": "patterns", "markov": True, "z_dim": 2}, {**FRAMES, "epochs": 70}, {}),
    Construction("not converged", "vae", {"source": "fashion", "told": "class"}, {**SHORT, "lr": 4e-4}, {}),
    Construction("not converged", "vae", {"scale": 0.25, "hidden": 48}, {**SHORT, "lr": 3e-4}, {}),
    Construction("not converged", "factors", {"x_dim": 45}, {**SHORT, "lr": 4e-4, "epochs": 15}, {}),
    Construction("not converged", "vrnn", {"markov": True, "z_dim": 2}, {"lr": 1.2e-3, "epochs": 9, "decay": 1.0}, {}),
    Construction("posterior collapse", "vae", {"scale": 3.5, "hidden": 48}, {}, {}),
    Construction("posterior collapse", "vae", {"source": "coins", "z_dim": 4, "hidden": 64}, {"lr": 8e-3}, {}),
    Construction("posterior collapse", "vae", {"told": "copy", "hidden": 64, "scale": 0.7, "z_dim": 3}, {}, {}),
    Construction("posterior collapse", "vrnn", {"hidden": 24}, {"epochs": 24, "lr": 1.5e-2}, {}),
    Construction("over-regularized", "vae", {"z_dim": 5}, {"beta": 55.0}, {}),
    Construction("over-regularized", "vae", {"source": "fashion", "told": "class"}, {"beta": 35.0}, {}),
    Construction("over-regularized", "regression", {"groups": 7}, {**LINES, "beta": 35.0}, {}),
    Construction(
        "over-regularized", "vrnn", {"markov": True, "hidden": 20}, {"beta": 11.0, "epochs": 22, "lr": 2e-2}, {}
    ),
    Construction("overfitting", "vae", {"rows": 65, "hidden": 256, "z_dim": 8}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 80, "hidden": 320, "told": "class", "z_dim": 5}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 80, "hidden": 256, "scale": 0.1}, FEW_ROWS, {}),
    Construction("overfitting", "vae", {"rows": 70, "hidden": 320, "source": "fashion", "z_dim": 8}, FEW_ROWS, {}),
    Construction("KL shrinkage", "factors", {"rows": 65, "noise": 35, "z_dim": 4}, MEMORY, {}),
    Construction("KL shrinkage", "factors", {"rows": 85, "noise": 40, "x_dim": 45}, MEMORY, {}),
    Construction("KL shrinkage", "vae", {"rows": 290, "told": "noise", "hidden": 12}, MEMORY, {}),
    Construction("KL shrinkage", "vae", {"rows": 280, "told": "noise", "source": "fashion", "hidden": 14}, MEMORY, {}),
    Construction("warm-up too long", "vae", {"source": "fashion", "z_dim": 3}, {"beta": "warm-up"}, {}),
    Construction("warm-up too long", "vae", {"told": "class", "scale": 0.3}, {"beta": "warm-up", "epochs": 35}, {}),
    Construction("warm-up too long", "regression", {"groups": 7}, {**LINES, "beta": "warm-up", "epochs": 170}, {}),
    Construction("warm-up too long", "factors", {"z_dim": 5}, {"beta": "warm-up", "epochs": 35}, {}),
    Construction("diverging", "vae", {"z_dim": 5}, {"decay": 350.0}, {}),
    Construction("diverging", "vae", {"told": "class", "source": "fashion"}, {"decay": 450.0}, {}),
    Construction("diverging", "regression", {"groups": 7}, {**LINES, "lr": 0.05, "epochs": 210, "decay": 110.0}, {}),
    Construction("diverging", "vrnn", {"markov": True, "z_dim": 2}, {"lr": 1e-2, "epochs": 22, "decay": 350.0}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "z_dim": 5}, {"free_bits": 0.6}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "fixed_scale": 0.25, "scale": 0.3}, {}, {}),
    Construction("dead decoder", "vae", {"deaf": True, "told": "class", "z_dim": 5}, {"capacity": 6.0}, {}),
    Construction(
        "dead decoder", "vrnn", {"deaf": True, "hidden": 20}, {"free_bits": 0.4, "epochs": 14, "lr": 1e-2}, {}
    ),
    Construction("exploding KL", "vae", {"z_dim": 6}, {"beta": 9e-4, "decay": 1.0}, {}),
    Construction("exploding KL", "vae", {"told": "class", "source": "fashion"}, {"beta": 7e-4, "decay": 1.0}, {}),
    Construction("exploding KL", "vae", {"z_dim": 3}, {"capacity": 220.0, "decay": 1.0}, {}),
    Construction(
        "exploding KL", "vrnn", {"markov": True, "z_dim": 2}, {"beta": 7e-4, "epochs": 25, "lr": 2e-2, "decay": 1.0}, {}
    ),
    Construction("noisy objective", "vae", {"discrete": True, "z_dim": 32, "rows": 95}, FEW, {}),
    Construction("noisy objective", "vae", {"discrete": True, "z_dim": 28, "rows": 100, "source": "fashion"}, FEW, {}),
    Construction("noisy objective", "regression", {"groups": 7, "rows": 180}, {**FEW, "lr": 0.3, "epochs": 13}, {}),
    Construction("noisy objective", "vae", {"rows": 95, "told": "class"}, {**FEW, "batch": 2, "epochs": 13}, {}),
]
