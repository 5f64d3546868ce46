"""The aggregator: one short-lived Flower ServerApp process per run, over NATS.

May import fabric; never coordinator or edge_agent. Talks to the coordinator by reports only.
"""
