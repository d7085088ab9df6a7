"""The command line: one module for each group of verbs, each verb declared once (`verb.py`)."""
