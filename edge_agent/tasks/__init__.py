"""Training tasks on a node: orders in, one at a time, answers out through the outbox.

May import training's job format, samples and serving.
"""
