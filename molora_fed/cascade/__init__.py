"""Answering tasks: probe cheaply, escalate where samples disagree, record every decision."""
