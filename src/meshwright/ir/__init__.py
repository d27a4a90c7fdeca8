"""What happens: parameters, ops, collectives, pipeline order and the program of a plan."""
