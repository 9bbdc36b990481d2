"""Processors, quotas, threads, memory, progress."""
