"""Judges of draft trees."""

from specdec.verifiers.pathwise import PathwiseVerifier
from specdec.verifiers.rejection import RejectionVerifier
from specdec.verifiers.transfer import TransferVerifier

__all__ = ["PathwiseVerifier", "RejectionVerifier", "TransferVerifier"]
