"""Taut."""
