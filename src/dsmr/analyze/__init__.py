"""What memory is worth: by layer, by distance, by note, and the schedule that this suggests."""
