"""Calls of the Kubernetes API, with its errors as ours.

May import errors only.
"""
