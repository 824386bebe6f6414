"""Studies of the evolutionary population, and the tasks they are made of."""
