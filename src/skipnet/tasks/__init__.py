"""Objectives: what a training step minimises. The loop knows none of them."""
