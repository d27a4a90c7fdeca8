"""How long and how much: priced per task, never per step."""
