"""From RLDS on disk to batches of clips; text, canvas and normalisation, which policies share."""
