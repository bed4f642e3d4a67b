"""Judges of draft trees."""

from specdec.verifiers.pathwise import PathwiseVerifier

__all__ = ["PathwiseVerifier"]
