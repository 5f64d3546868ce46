"""The control plane: fleet, runs, registry, roll-outs, API, CLI, and the embedded mode.

May import fabric; agents and aggregators are reached as processes and messages only.
"""
