"""Requests that a node kept, and their labels. They never leave the node.

May import serving.
"""
