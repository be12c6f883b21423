"""Whole numbers of 8 bits: Taut's export beside NNCF, ONNX Runtime's quantizer and torchao."""

from __future__ import annotations

import argparse

from harness import Figure

NAME = "int8"


def figures(options: argparse.Namespace) -> list[Figure]:
    """The rows of this section."""
    return []
