"""Runs and their rounds: one reducer each.

Pure: may import commands, fabric and the domain fleet.
"""
