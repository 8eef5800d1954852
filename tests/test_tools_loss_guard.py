import numpy as np
import pytest

from hf_selfattn.tools.loss_guard import LossGuard


def stops(losses, **options):
    """The number of the loss, from 0, at which training stops; None."""
    guard = LossGuard(**options)
    return next((number for number, loss in enumerate(losses) if guard.see(float(loss))), None)


def falling(steps, noise, seed=0):
    """A curve like that of a pretraining, 9 to 2, with noise in proportion (its logarithm is normal)."""
    draw = np.random.default_rng(seed)
    return (2 + 7 * np.exp(-np.arange(steps) / 300)) * np.exp(noise * draw.standard_normal(steps))


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2, 1.0])
def test_noise_stops_nothing(noise):
    assert stops(falling(50_000, noise)) is None


def test_rare_hard_batches_stop_nothing():
    """A classifier that knows its data: nearly 0, and one batch in five is wrong."""
    draw = np.random.default_rng(0)
    losses = np.where(draw.random(50_000) < 0.2, draw.exponential(1.0, 50_000), 0.001 * draw.random(50_000))
    assert stops(losses) is None


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("level", [2.0, 10.0, 1e6])
def test_a_loss_that_rises_and_stays_is_found(noise, level):
    losses = falling(2000, noise)
    losses[1500:] *= level
    assert stops(losses) == 1500 + LossGuard.patience - 1


def test_a_climb_is_found():
    """From 2 to 10 within 200 steps, and within 1000."""
    for steps in (200, 1000):
        losses = falling(3500, 0.05)
        losses[2000:] += np.minimum(8, 8 / steps * np.arange(1500))
        assert 2000 < stops(losses) < 2000 + steps


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stops_at_once(loss):
    assert stops([2.0, loss]) == 1
    assert stops([loss], deviations=0) == 0


def test_mean_and_deviation_are_plain_ones_at_first():
    losses = falling(40, 0.3)
    guard = LossGuard()
    for loss in losses:
        guard.see(float(loss))
    assert guard.mean == guard.first == guard.lowest == pytest.approx(losses.mean())
    assert guard.variance == pytest.approx((np.diff(losses) ** 2).mean() / 2)


def test_a_restored_guard_goes_on():
    losses = falling(300, 0.1)
    losses[200:] *= 10
    for pause in (120, 205):
        first, second = LossGuard(), LossGuard()
        for loss in losses[:pause]:
            first.see(float(loss))
        second.restore(first.state())
        assert second == first
        rest = [second.see(float(loss)) is not None for loss in losses[pause:]]
        assert pause + rest.index(True) == 209


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"--divergence_deviations is at least 0 .*, got -1"):
        LossGuard(deviations=-1)
    with pytest.raises(ValueError, match="--divergence_patience is at least 1 step, got 0"):
        LossGuard(patience=0)


@pytest.mark.parametrize("jump", [12, 20, 45])
def test_a_jump_in_the_first_steps_is_seen(jump):
    losses = np.concatenate([falling(jump, 0.05) + 6, np.full(200, 30.0)])
    assert stops(losses) == jump + LossGuard().patience - 1
