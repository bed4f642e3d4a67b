"""Counts of guesses as they are saved while others count."""

import numpy as np

from specdec.calibration import Acceptance


def test_saved_counts_stay_as_they_were_while_others_learn():
    acceptance = Acceptance(np.full(2, 0.5), weight=4.0)
    saved = acceptance.counts()
    acceptance.learn(np.array([7, 8]), np.array([-1, 0]), np.array([0, 1]), np.array([8]))
    assert acceptance.offered.tolist() == [4.0, 5.0]
    assert saved["offered"].tolist() == [4.0, 4.0]
    assert saved["accepted"].tolist() == [2.0, 2.0]


def test_saved_counts_can_be_loaded_though_they_were_read_while_one_was_halved(tmp_path):
    """Another thread has halved what was offered and not yet what was accepted."""
    acceptance = Acceptance(np.full(2, 0.9), weight=1000.0)
    acceptance.offered[1] *= 0.5
    acceptance.save(tmp_path / "counts", "test")
    acceptance.load(tmp_path / "counts", "test")
    assert acceptance.rate[1] == 1.0


def test_no_rate_is_more_than_one_though_a_count_of_offers_was_lost():
    """Two threads have counted at once, and what one of them offered was overwritten."""
    acceptance = Acceptance(np.full(2, 1.0), weight=4.0)
    acceptance.offered[1] -= 1.0
    assert acceptance.rate.tolist() == [1.0, 1.0]
    assert acceptance.paths(np.array([-1, 0, 1]), np.array([0, 1, 1])).tolist() == [1.0, 1.0, 1.0]
    acceptance.learn(np.array([7, 8]), np.array([-1, 0]), np.array([0, 1]), np.array([8]))
    assert acceptance.accepted[1] == acceptance.offered[1] == 4.0
