"""Drafters made for one target, from what that target writes."""
