"""The columns of a history: epochs with different sites, states, weights, and the best epoch."""

import numpy as np
import torch

import pyro_elbo as pe
from pyro_elbo.training.history import History, Weights


def totals(elbo, **more):
    elbo = np.array(elbo, float)
    return {"loss": -elbo, "elbo": elbo, "distortion": -elbo, "rate": 0 * elbo, **more}


def recorded(loss, splits=("train",)):
    """Three epochs of sites z and w, then two of z alone; the second and third epoch were courses."""
    history = History()
    for split in splits:
        for first, elbo, sites in ((0, [-3], "zw"), (1, [-1, -2], "zw"), (3, [-1, -5], "z")):
            columns = totals(elbo, **{f"kl/{site}": np.arange(len(elbo)) + 1.0 for site in sites})
            history.add(split, first, columns | Weights(loss).after(range(first + 1, first + 1 + len(elbo)), columns))
    return history


def test_epochs_with_different_sites_share_a_table():
    data = recorded(pe.TraceBeta_ELBO(beta={"z": 2.0, "w": 3.0}), ("valid", "train")).to_dataset()
    assert data.epoch.values.tolist() == [0, 1, 2, 3, 4]
    assert data.latent.values.tolist() == ["z", "w"]
    assert data.elbo.sel(split="valid").values.tolist() == [-3, -1, -2, -1, -5]
    np.testing.assert_equal(data.kl.sel(split="train", latent="w").values, [1, 1, 2, np.nan, np.nan])
    np.testing.assert_equal(data.beta.values, [[2, 3], [2, 3], [2, 3], [2, np.nan], [2, np.nan]])


def test_a_state_gives_the_history_back():
    history = recorded(pe.TraceBeta_ELBO(beta=pe.Capacity(0.0, 1.0, steps=3, gamma=9.0)))
    history.add_probe({"train": {"gradient_norm": 2.0}, "valid": {}})
    again = History.of(history.state())
    assert again.to_dataset().identical(history.to_dataset())
    assert again.to_dataset().beta.attrs == {"note": "weight at the end of the epoch", "targets": ["z", "w"]}
    assert again.to_dataset().gradient_norm.dropna("epoch").epoch.values.tolist() == [4]
    assert (again.last, again.best()) == (4, history.best())


def test_the_best_epoch_is_the_first_of_the_highest_after_the_warm_up():
    assert recorded(pe.TraceBeta_ELBO()).best() == 1
    assert recorded(pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=3))).best() == 3
    history = recorded(pe.TraceBeta_ELBO())
    history.add("valid", 2, totals([-9.0]) | Weights(pe.TraceBeta_ELBO()).after(range(3, 4), ()))
    assert history.best() == 2


def test_weights_are_those_after_each_step():
    penalty = pe.MutualInformation("z", lambda x: x, pe.LinearWarmup(0.0, 4.0, steps=2), "club", levels=2)
    loss = pe.TraceBeta_ELBO(beta={"z": pe.LinearWarmup(0.0, 1.0, steps=4), "w": torch.tensor([1.0, 3.0])})
    loss = pe.TraceBeta_ELBO(beta=loss.weighting.beta, penalties=[penalty])
    weights, names = Weights(loss), ["loss", "kl/z", "kl/w"]
    assert weights.after(range(1, 2), names)["beta/z"].tolist() == [0.25]
    found = weights.after(range(2, 8), names)
    assert found["beta/z"].tolist() == [0.5, 0.75, 1, 1, 1, 1]
    assert found["beta/w"].tolist() == [2] * 6
    assert found[f"penalty_weight/{penalty.name}"].tolist() == [4] * 6
    assert found["settled"].tolist() == [0, 0, 1, 1, 1, 1]
    assert weights.after(range(9, 10), names)["beta/z"].tolist() == [1]


def test_whole_numbers_are_weights():
    loss = pe.TraceBeta_ELBO(beta={"z": 4, "w": torch.tensor([1, 2])})
    assert loss.beta_at(0, ["z", "w"]) == {"z": 4.0, "w": 1.5}
