"""Drift: what a node's models see, as histograms, summed in the region.

May import serving.
"""
