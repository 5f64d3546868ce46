"""Flower's Grid over NATS: messages out, replies in, and what is reported of them.

May import link, folding and sums.
"""
