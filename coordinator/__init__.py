"""The control plane: event log, reducers for fleet, runs, models, roll-outs and rules, HTTP API.

May import fabric; agents and aggregators are reached as processes and messages only.
"""
