"""What a run did, as one HTML page, one JSON file and one model card."""
