"""What runs in Lava's own interpreter (Python 3.10): a script; nothing here is imported by the rest of the project.

Lava imports and executes every Python file that lies beside a Process class, so this folder holds only files that may
be executed at any time: they define things and do nothing.
"""
