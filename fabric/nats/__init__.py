"""The broker: the one place that speaks NATS, with its subjects, streams, permissions and credentials.

May import tensors and process; nothing here knows a run, a release or a round.
"""
