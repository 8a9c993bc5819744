"""`aisle stream`: classify the messages of one topic into another, each exactly once."""
