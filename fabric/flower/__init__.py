"""Flower apps and Flower's records, and the one module that uses what is not flwr's public API.

May import messages and tensors.
"""
