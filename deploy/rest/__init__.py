"""The REST front: HTTP and JSON over the asyncio client."""
