"""Studies of escalation by disagreement."""
