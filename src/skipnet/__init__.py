"""Dynamic block skipping in residual networks."""
