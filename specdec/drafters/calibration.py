"""Calibration, where drafters look for it."""

from specdec.calibration import Acceptance, count

__all__ = ["Acceptance", "count"]
