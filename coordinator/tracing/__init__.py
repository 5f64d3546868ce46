"""Traces, as a view of the event log."""
