"""Training: the paper's recipe, the same numbers on one rank or many, exact to resume."""
