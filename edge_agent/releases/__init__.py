"""Releases on a node: download, verify, store, activate.

May import serving, comparison and identity.
"""
