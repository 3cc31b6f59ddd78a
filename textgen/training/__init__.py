"""Losses, optimizers, the jitted step and the loop around it."""
