"""The agent of one edge node: tasks, model store, inference, presence, outbox.

May import fabric; never coordinator or aggregation. Idle, it loads neither flwr nor torch.
"""
