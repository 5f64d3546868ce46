"""Candidate against incumbent on one node, while a roll-out watches.

May import serving and samples.
"""
