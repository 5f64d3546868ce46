"""Embedded mode: the whole system on one machine, as real processes under one supervisor."""
