"""What a person runs: API client, CLI, embedded mode, demo, operator of custom resources.

May import fabric; coordinator, agents and aggregators are reached as processes or over HTTP.
"""
