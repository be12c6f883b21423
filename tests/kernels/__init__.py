"""Tests of the kernels, an operation a file."""
