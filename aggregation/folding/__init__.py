"""Updates into sums, here or in another process: a region's fold worker, a shard.

May import sums.
"""
