"""From a plan to its step time, and from a deployment to its best plan."""
