"""Trainer processes: one job a line, in files.

Processes of their own: may import samples.source and fabric.
"""
