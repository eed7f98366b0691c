"""Hand-made training histories: a settled fit, and what each mistake does to it."""

import numpy as np
import xarray

EPOCHS = 40
T = np.arange(EPOCHS)
SETTLING = np.exp(-T / 4)
UNITS = ["z[0]", "z[1]"]


def history(
    *,
    splits=("train", "valid"),
    beta=1.0,
    distortion=0.0,
    rate=0.0,
    kl_per_dim=(2.0, 2.0),
    exchange=10.0,
    gradient=(1.0, 2.0),
):
    """Return the history of a fit that settles at distortion 100 and rate 4, with what is added to it.

    ``distortion`` and ``rate`` are added to both splits, or are pairs for training and validation; ``gradient`` is its
    norm and its noise.
    """
    rng = np.random.default_rng(0)

    def by_split(base, added):
        pair = added if isinstance(added, tuple) else (added, added)
        curves = np.stack([base + more + 0.01 * rng.normal(size=EPOCHS) for more in pair], -1)
        missing = [s not in splits for s in ("train", "valid")]
        curves[:, missing] = np.nan
        return curves

    weights = np.broadcast_to(beta, (EPOCHS,)).astype(float)
    d, r = by_split(100 + 30 * SETTLING, distortion), by_split(4 - 2 * SETTLING, rate)
    probed = np.isin(T, (0, 10, 20, 30, EPOCHS - 1))
    seen = np.where(probed[:, None] & ~np.isnan(d), 1.0, np.nan)
    units = seen[..., None] * np.broadcast_to(kl_per_dim, (EPOCHS, 2, 2))
    variables = {
        "elbo": (("epoch", "split"), -d - r),
        "loss": (("epoch", "split"), d + weights[:, None] * r),
        "distortion": (("epoch", "split"), d),
        "rate": (("epoch", "split"), r),
        "kl": (("epoch", "split", "latent"), r[..., None]),
        "beta": (("epoch", "latent"), weights[:, None]),
        "kl_per_dim": (("epoch", "split", "unit"), units),
        "active_units": (("epoch", "split", "latent"), (seen * np.sum(np.asarray(kl_per_dim) > 0.05))[..., None]),
        "own_distortion": (("epoch", "split"), seen * 100),
        "swapped_distortion": (("epoch", "split"), seen * (100 + exchange)),
        "gradient_norm": (("epoch",), np.where(probed, gradient[0], np.nan)),
        "gradient_noise": (("epoch",), np.where(probed, gradient[1], np.nan)),
    }
    coords = {
        "epoch": T,
        "split": ["train", "valid"],
        "latent": ["z"],
        "unit": UNITS,
        "unit_latent": ("unit", ["z", "z"]),
    }
    return xarray.Dataset(variables, coords)


LATE = np.maximum(T - 20, 0.0)
CASES = {
    "healthy": {},
    "not converged": {"distortion": -3.0 * T},
    "posterior collapse": {"kl_per_dim": (0.001, 0.0), "exchange": 0.0, "rate": -3.99 + 2 * SETTLING},
    "over-regularized": {"beta": 20.0, "kl_per_dim": (0.5, 0.0), "exchange": 2.0},
    "overfitting": {"distortion": (0.0, LATE)},
    "KL shrinkage": {"rate": (0.0, LATE)},
    "warm-up too long": {"beta": T / (EPOCHS - 1)},
    "diverging": {"distortion": LATE},
    "dead decoder": {"exchange": 0.0},
    "exploding KL": {"rate": LATE, "distortion": -0.1 * LATE, "beta": 0.01},
    "noisy objective": {
        "distortion": -30 * SETTLING + 5 * np.random.default_rng(1).normal(size=EPOCHS),
        "gradient": (1.0, 50.0),
    },
}
"""What each finding is made from; nothing but that one is to be found."""
