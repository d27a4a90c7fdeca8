"""A step run event by event: the estimator's prices, put together along the schedule's own orders."""
