"""Accuracy against computation."""
