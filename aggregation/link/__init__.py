"""The asynchronous half of the Grid: one event loop that moves messages and blobs.

May import folding and sums.
"""
