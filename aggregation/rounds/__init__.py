"""Rounds of one run: Flower's loop, resumable, with checkpoints and policies.

May import grid, link, folding, sums and strategies.
"""
