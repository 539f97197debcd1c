"""What is done to features before a method sees them: means, scales, whitening, and features float32 cannot hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from plm.method.conditioning import FeatureConditioning, FeatureStatistics, shrinkage
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lore import LoRe
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch

DIM = 5


def batch_of(num_pairs: int = 200, scale: float = 1.0, offset: float = 0.0, seed: int = 0) -> PreferenceBatch:
    """Correlated features with a mean."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=draw)
    chosen, rejected = (scale * (torch.randn(num_pairs, DIM, generator=draw) @ mix + offset) for _ in range(2))
    zeros = torch.zeros(num_pairs)
    return PreferenceBatch(chosen, rejected, zeros.long(), zeros + 1, zeros.bool())


def measured(kind: str, *batches: PreferenceBatch) -> tuple[FeatureConditioning, float]:
    conditioning = FeatureConditioning(kind, DIM)  # type: ignore[arg-type]
    return conditioning, conditioning.measure(batches, lambda value: value)[1]


def test_centring_subtracts_the_mean_training_response() -> None:
    batch = batch_of(offset=7.0)
    conditioning, scale = measured("centre", batch)
    both = torch.cat(batch.features).double()
    torch.testing.assert_close(conditioning.mean.double(), both.mean(0), atol=2.0**-12 * scale, rtol=0)
    assert scale == pytest.approx(float(batch.difference.double().square().sum(-1).mean().sqrt()), rel=1e-6)
    assert conditioning(both.float()).mean(0).abs().max() < 1e-3 * scale


def test_statistics_add_up_over_batches_in_any_order_to_the_bit() -> None:
    one, two = batch_of(seed=1, offset=3.0), batch_of(seed=2)
    first, second = (measured("centre", *order)[0] for order in ((one, two), (two, one)))
    assert torch.equal(first.mean, second.mean) and first.mean.any()


def test_standardised_differences_have_unit_root_mean_square() -> None:
    batch = batch_of(offset=2.0)
    conditioning, scale = measured("standardise", batch)
    difference = (conditioning(batch.features[0]) - conditioning(batch.features[1])).double()
    torch.testing.assert_close(difference.square().mean(0), torch.ones(DIM).double(), atol=1e-5, rtol=0)
    assert scale == pytest.approx(DIM**0.5)


def test_whitening_is_the_inverse_root_of_the_shrunk_covariance() -> None:
    """Shrinkage by scikit-learn's Ledoit-Wolf on the same differences, the root by SciPy-free algebra: W C W = I."""
    batch = batch_of(num_pairs=40)
    difference = batch.difference.double().numpy()
    covariance, share = ledoit_wolf(difference, assume_centered=True)
    conditioning, scale = measured("whiten", batch)
    factor = conditioning.factor.double().numpy()
    np.testing.assert_allclose(factor @ covariance @ factor, np.eye(DIM), atol=1e-4)
    x = torch.from_numpy(difference)
    statistics = FeatureStatistics(
        torch.tensor(40.0).double(),
        torch.zeros(DIM).double(),
        torch.zeros(DIM).double(),
        x.T @ x,
        x.square().sum(-1).square().sum(),
    )
    assert 0.01 < share < 0.9 and shrinkage(statistics) == pytest.approx(share, rel=1e-9)
    assert scale == pytest.approx(float(np.sqrt(np.square(difference @ factor).sum(-1).mean())), rel=1e-4)


@pytest.mark.parametrize("kind", ["none", "centre", "standardise", "whiten"])
def test_a_direction_gives_the_same_differences_of_rewards_in_both_spaces(kind: str) -> None:
    batch, raw = batch_of(offset=1.0), torch.linspace(-1, 1, DIM)
    conditioning, _ = measured(kind, batch)
    chosen, rejected = map(conditioning, batch.features)
    direction = conditioning.direction(raw)
    torch.testing.assert_close((chosen - rejected) @ direction, batch.difference @ raw, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("scale", "word"), [(1e20, "overflow"), (1e-38, "underflow"), (float("inf"), "overflow")])
def test_features_that_float32_cannot_square_are_refused(scale: float, word: str) -> None:
    data = PlantedData()
    data.change(lambda chosen, rejected: (scale * chosen, scale * rejected))
    with pytest.raises(ValueError, match=rf"features: .*{word}.* in float32; multiply the features"):
        quiet_trainer(".", max_epochs=1).fit(BradleyTerry(12, 8), datamodule=data)


@pytest.mark.parametrize("kind", ["standardise", "whiten"])
def test_a_checkpoint_keeps_the_statistics_and_score_applies_them(kind: str) -> None:
    """Rewards of raw features are those of the conditioned ones under the method's own maths."""
    data = PlantedData()
    stretch = torch.logspace(-1, 1, 8)
    data.change(lambda chosen, rejected: (chosen * stretch + 5, rejected * stretch + 5))
    torch.manual_seed(0)
    method = LoRe(12, 8, num_bases=3, conditioning=kind)
    quiet_trainer(".", max_epochs=5).fit(method, datamodule=data)
    loaded = LoRe(12, 8, num_bases=3, conditioning=kind)
    loaded.load_state_dict(method.state_dict())
    users, raw = method.user_states(torch.arange(12)), data.test_batch.chosen[:12]
    read: Tensor = (raw - method.conditioning.mean) * 1.0
    factor = method.conditioning.factor
    read = read @ factor if kind == "whiten" else read * factor
    expected = ((read @ method._bases()) * users.tensors["weights"]).sum(-1)
    torch.testing.assert_close(loaded.score(raw, users), expected)


def test_conditioning_of_what_is_no_feature_is_refused() -> None:
    from plm.methods.sft import SFT

    spec = {"class_path": "plm.backbones.CausalLM", "init_args": {"model": "x"}}
    with pytest.raises(ValueError, match=r"model.conditioning: acts on features, and SFT reads tokens"):
        SFT(num_users=1, feature_dim=4, backbone=spec, conditioning="whiten")
    with pytest.raises(ValueError, match=r"model.conditioning: expected one of none, centre"):
        BradleyTerry(2, 4, conditioning="center")
