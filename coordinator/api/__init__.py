"""The HTTP API: its routes, access to it, and what a standby answers.

May import adapters, log, state and the domains.
"""
