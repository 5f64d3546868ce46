"""Sums that do not depend on the order of their terms, and what may enter them.

Imports nothing else of the aggregator.
"""
