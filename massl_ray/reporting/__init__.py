"""What people look at: the console, the report, pictures."""
