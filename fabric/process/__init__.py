"""Processes and files of one machine: parent and child, PID files, retries, disks.

May import errors only.
"""
