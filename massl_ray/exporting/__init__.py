"""The backbone of a checkpoint, in the forms that other programs load."""
