"""Judges of draft trees."""

from specdec.verifiers.pathwise import PathwiseVerifier
from specdec.verifiers.rejection import RejectionVerifier

__all__ = ["PathwiseVerifier", "RejectionVerifier"]
