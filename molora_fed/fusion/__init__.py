"""Plan, fuse, guard against collapse, result."""
