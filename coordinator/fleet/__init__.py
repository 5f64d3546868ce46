"""The fleet: nodes, what they can do, and whether they are online.

Pure: may import commands and fabric.
"""
