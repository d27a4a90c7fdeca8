"""Running a rank's step without memory and without the others: fake tensors, a fake process group.

The code that runs is the one that trains; what differs is named in `seams.py`.
"""
