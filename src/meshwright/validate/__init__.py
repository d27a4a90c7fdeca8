"""Published runs: what they state, as plans that are predicted and scored."""
