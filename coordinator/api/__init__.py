"""The HTTP API, and who answers it.

May import adapters, log, state and the domains.
"""
