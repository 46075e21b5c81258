"""Joins the rooms in order; what the command line does, it does through here."""
