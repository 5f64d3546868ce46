"""The event log and the loop around it: append, snapshot, lease, timers, history.

May import state and the domains.
"""
