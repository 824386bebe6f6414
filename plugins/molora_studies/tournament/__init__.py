"""`molora tournament`: every registered router on the same frozen adapters and banks, ranked."""
