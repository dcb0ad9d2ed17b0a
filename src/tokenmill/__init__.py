"""tokenmill: generate text in bulk from a message queue. Import from the defining module."""
