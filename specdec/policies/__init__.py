"""Choosers of how much to draft."""

from specdec.policies.fixed import FixedPolicy
from specdec.policies.threshold import ThresholdPolicy
from specdec.policies.throughput import ThroughputPolicy

__all__ = ["FixedPolicy", "ThresholdPolicy", "ThroughputPolicy"]
