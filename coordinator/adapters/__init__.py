"""What arrives from the broker and the clock becomes events; what commands ask for becomes messages.

May import log, state and the domains.
"""
