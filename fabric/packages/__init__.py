"""Python packages that an app needs beside those of its node: what is missing, and an environment that has it.

May import errors, strict and process. `packaging` and uv come with flwr: an agent without it does without this room,
but for its rules and what keeps environments.
"""
