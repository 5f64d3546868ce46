"""The release authority: a process with a key of its own, which vouches for what a run has made.

May import fabric only: it believes no coordinator.
"""
