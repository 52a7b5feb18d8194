"""The loop: devices, precision, checkpoints, logging. It knows no algorithm."""
