"""meshwright: audit, plan, simulate, dry-run and train mixture-of-experts deployments."""

__version__ = "0.1.0"
