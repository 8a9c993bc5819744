"""The routes of the desk, a module for each page."""
