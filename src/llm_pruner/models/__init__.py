"""What kind of model this is, how it runs, and models that ``transformers`` lacks."""
