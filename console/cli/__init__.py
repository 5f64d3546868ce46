"""The `fedtide` command line: thin over the HTTP API, the same API the dashboard calls.

Loads rich, yaml and the embedded mode only in the commands that need them.
"""
